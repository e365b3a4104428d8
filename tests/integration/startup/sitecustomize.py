"""Run by every Python that a script of the tests starts: two thirds of what such a short process costs are saved.

Most of that is what lightning imports and no script here needs (``lean_imports``). And the garbage collector walks a
dozen times through all of the modules while they are imported, and three times at the end: until then it is kept from
it, and afterwards it leaves them alone, and looks after what the script makes as it always does. The other ranks of the
script, and its servers, are forked from what it has imported (``spares``). Not so where the environment says
``LIGHTNING_STALE_TEST_GC=plain``, for tests of how a process starts and ends.
"""

from __future__ import annotations

import gc
import os
import sys

import lean_imports
import spares

THRESHOLDS = gc.get_threshold()
SPARES = 4


def after_lightning() -> None:
    """Have the garbage collector look after what comes from now on, and processes forked that start from here."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    if sys.argv[0].endswith("script.py") and os.environ.get("LOCAL_RANK", "0") == "0":
        spares.keep(SPARES)


if os.environ.get("LIGHTNING_STALE_TEST_GC") == "plain":
    lean_imports.install(lean_imports.postpone_compiler)
else:
    gc.set_threshold(*THRESHOLDS[:2], 1000)
    lean_imports.install(lean_imports.postpone_compiler, after_lightning)
