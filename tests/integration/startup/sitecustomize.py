"""Run by every Python that a script of the tests starts: two thirds of what such a short process costs are saved.

Most of that is what lightning imports and no script here needs (``lean_imports``). And the garbage collector walks a
dozen times through all of the modules while they are imported, and three times at the end: until then it is kept from
it, and afterwards it leaves them alone, and looks after what the script makes as it always does. Not so where the
environment says ``LIGHTNING_STALE_TEST_GC=plain``, for tests of how a process ends.
"""

from __future__ import annotations

import gc
import os

import lean_imports

THRESHOLDS = gc.get_threshold()


def leave_modules_alone() -> None:
    """Have the garbage collector look after what comes from now on."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


if os.environ.get("LIGHTNING_STALE_TEST_GC") == "plain":
    lean_imports.install(lean_imports.postpone_compiler)
else:
    gc.set_threshold(*THRESHOLDS[:2], 1000)
    lean_imports.install(lean_imports.postpone_compiler, leave_modules_alone)
