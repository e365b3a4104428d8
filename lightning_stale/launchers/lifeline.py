"""A process that ends with the one that has started it, however that one has ended."""

from __future__ import annotations

import os
import signal
import threading
import time

_PERIOD_S = 0.5


def end_with(parent: int, grace_s: float) -> None:
    """Let this process be killed ``grace_s`` seconds after ``parent``, the process id of its parent, is gone."""
    threading.Thread(target=_watch, args=(parent, grace_s), name="lifeline", daemon=True).start()


def _watch(parent: int, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
