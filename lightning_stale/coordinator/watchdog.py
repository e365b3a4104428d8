"""The server ends with rank 0, whatever its main thread does: import torch, or hang in the step of an optimizer."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import sys
import threading
import time

GRACE_S = 5.0
"""What the main thread has to tell the workers and end by itself, once rank 0 is gone."""

_PR_SET_PDEATHSIG = 1
_UNUSED_SIGNAL = 16  # SIGSTKFLT, which neither Linux nor anybody else sends


def end_with(parent: int, lifeline: int) -> None:
    """End this process a few seconds after rank 0 has ended, or let go of it.

    Call it in the main thread, and before anything that may hang.

    Args:
        parent: the process id of rank 0, which has started this process.
        lifeline: a descriptor that reads as closed when rank 0 closes it, or ends.
    """
    if sys.platform == "linux":
        _have_the_kernel_end_it()
    threading.Thread(target=_watch, args=(parent, lifeline), name="watchdog", daemon=True).start()


def _watch(parent: int, lifeline: int) -> None:
    closed = select.poll()
    closed.register(lifeline, 0)  # no data: hang-up and errors only
    while os.getppid() == parent and not closed.poll(500):
        pass
    time.sleep(GRACE_S)
    print(
        f"ERROR: rank 0 has ended, and {GRACE_S:.0f} s later the parameter server has not, which is made to: it hangs, "
        "most likely in the step of an optimizer",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)


def _have_the_kernel_end_it() -> None:
    """Have this process killed even if a C extension holds the interpreter lock, so that no thread of Python's runs.

    When the thread that has started this process ends (in rank 0, the one in which `fit` runs), the kernel sends a
    signal, whose handler is the C library's ``alarm``, with the number of the signal as its argument: so many seconds
    later, longer than :data:`GRACE_S`, SIGALRM ends the process. No line of Python is needed for that.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(_UNUSED_SIGNAL, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, _UNUSED_SIGNAL, 0, 0, 0)
