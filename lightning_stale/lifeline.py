"""A process ends with rank 0, which has started it, however that one ends and whatever this one's main thread does."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

GRACE_S = 5.0
"""What the main thread has to tell others and end by itself, once rank 0 is gone."""

_PERIOD_S = 0.5
_SAYING_S = 2
_PR_SET_PDEATHSIG = 1
_UNUSED_SIGNAL = 16  # SIGSTKFLT, which neither Linux nor anybody else sends


def end_with(
    parent: int,
    lifeline: int | None = None,
    grace_s: float = GRACE_S,
    says: str = "",
    stops: Callable[[], bool] = lambda: False,
) -> None:
    """End this process ``grace_s`` seconds after its parent has ended, or let go of it.

    With a lifeline it serves rank 0 alone. Call it in the main thread then, and before anything that may hang: it ends
    even if it hangs in C, and says where it hung in Python.

    Args:
        parent: the process id of the one that has started this process.
        lifeline: a descriptor that reads as closed when the parent closes it, or ends.
        grace_s: less than 16.
        says: what is printed if it has not ended by itself.
        stops: whether it is not to end with its parent any more.
    """
    _begin(parent, lifeline, lambda: grace_s, says, stops)


def serve_rank_0(parent: int) -> Callable[[], None]:
    """Make this process one that rank 0 has started and ends: no signal does, and it does not outlive rank 0.

    Args:
        parent: the process id of rank 0; standard input is the lifeline.

    Returns:
        What to call when it begins to serve. Until then there is nobody to tell that rank 0 has ended, and this process
        ends at once: what it imports meanwhile may take long on a busy machine.
    """
    # What is sent to the whole group, by Ctrl-C, a terminal that closes or SLURM: rank 0 decides when this ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    serving = threading.Event()
    _begin(parent, sys.stdin.fileno(), lambda: GRACE_S if serving.is_set() else 0.0)
    return serving.set


def _begin(
    parent: int,
    lifeline: int | None,
    grace_s: Callable[[], float],
    says: str = "",
    stops: Callable[[], bool] = lambda: False,
) -> None:
    if lifeline is not None:
        if sys.platform == "linux":
            _have_the_kernel_end_it()
        says = (
            f"rank 0 has ended, and {GRACE_S:.0f} s later this process ({' '.join(sys.orig_argv)}) has not, which is "
            "made to: it hangs here (a parameter server most likely in the step of an optimizer)"
        )
    what = (parent, lifeline, grace_s, says, stops)
    threading.Thread(target=_watch, args=what, name="lifeline", daemon=True).start()


def _watch(
    parent: int, lifeline: int | None, grace_s: Callable[[], float], says: str, stops: Callable[[], bool]
) -> None:
    closed = select.poll()
    if lifeline is not None:
        closed.register(lifeline, 0)  # no data: hang-up and errors only
    while os.getppid() == parent and not closed.poll(_PERIOD_S * 1000):
        if stops():
            return
    wait_s = grace_s()
    time.sleep(wait_s)
    if stops():
        return
    try:
        if says and wait_s > 0:
            _end_in_the_midst_of_saying_so()
            print(f"ERROR: {says}", file=sys.stderr, flush=True)
            if lifeline is not None:
                faulthandler.dump_traceback(all_threads=True)
    finally:  # nobody may read standard error any more
        os.kill(os.getpid(), signal.SIGKILL)


def _end_in_the_midst_of_saying_so() -> None:
    """Have the kernel end this process soon: who reads its standard error may have stopped, and the pipe be full."""
    ctypes.CDLL(None).signal(int(signal.SIGALRM), 0)  # what Python allows in the main thread only: the default action
    signal.alarm(_SAYING_S)


def _have_the_kernel_end_it() -> None:
    """Have this process killed even if a C extension holds the interpreter lock, so that no thread of Python's runs.

    When the thread that has started this process ends (in rank 0, the one in which `fit` runs), the kernel sends a
    signal, whose handler is the C library's ``alarm``, with the number of the signal as its argument: so many seconds
    later, longer than the grace, SIGALRM ends the process. No line of Python is needed for that.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(_UNUSED_SIGNAL, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, _UNUSED_SIGNAL, 0, 0, 0)
