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

GRACE_S = 5.0
"""What the main thread has to tell others and end by itself, once rank 0 is gone."""

_PERIOD_S = 0.5
_PR_SET_PDEATHSIG = 1
_UNUSED_SIGNAL = 16  # SIGSTKFLT, which neither Linux nor anybody else sends


def end_with(parent: int, lifeline: int | None = None, grace_s: float = GRACE_S) -> None:
    """End this process ``grace_s`` seconds after its parent has ended, or let go of it.

    With a lifeline it serves rank 0 alone. Call it in the main thread then, and before anything that may hang: it ends
    even if it hangs in C, and says where it hung in Python.

    Args:
        parent: the process id of the one that has started this process.
        lifeline: a descriptor that reads as closed when the parent closes it, or ends.
        grace_s: less than 16.
    """
    if lifeline is not None and sys.platform == "linux":
        _have_the_kernel_end_it()
    threading.Thread(target=_watch, args=(parent, lifeline, grace_s), name="lifeline", daemon=True).start()


def serve_rank_0(parent: int) -> None:
    """Make this process one that rank 0 has started and ends: no signal does, and it does not outlive rank 0.

    Args:
        parent: the process id of rank 0; standard input is the lifeline.
    """
    # What is sent to the whole group, by Ctrl-C, a terminal that closes or SLURM: rank 0 decides when this ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent, lifeline=sys.stdin.fileno())


def _watch(parent: int, lifeline: int | None, grace_s: float) -> None:
    closed = select.poll()
    if lifeline is not None:
        closed.register(lifeline, 0)  # no data: hang-up and errors only
    while os.getppid() == parent and not closed.poll(_PERIOD_S * 1000):
        pass
    time.sleep(grace_s)
    if lifeline is not None:
        print(
            f"ERROR: rank 0 has ended, and {grace_s:.0f} s later this process ({' '.join(sys.orig_argv)}) has not, "
            "which is made to: it hangs here (a parameter server most likely in the step of an optimizer)",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
    os.kill(os.getpid(), signal.SIGKILL)


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
