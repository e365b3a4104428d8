"""Reaches into private parts of Python (read in 3.11); a test fails when one of them moves."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import logging
import os
import sys


def exit_at_once(status: int = 0) -> None:
    """End the process as the interpreter does, but for taking all modules apart, which with torch takes a second.

    The functions of ``atexit`` run, and what files that nobody has closed still hold is written.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for thing in gc.get_objects():
        if issubclass(type(thing), (io.TextIOWrapper, io.BufferedWriter)):
            with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads any more
                thing.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
