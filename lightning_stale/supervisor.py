"""Runs a script, and again when it fails: ``python -m lightning_stale run --max-restarts 3 train.py ARGS``.

What is run is told by the environment where to note its checkpoints, and goes on from the newest of them
(:mod:`lightning_stale.strategies.restart`).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SUPERVISOR = "LIGHTNING_STALE_SUPERVISOR"
"""The process id of the supervisor, and the folder in which the run notes what it has saved."""
ATTEMPT = "LIGHTNING_STALE_RESTART"
"""Which restart this is, of how many: ``0/3`` at first."""

_ORPHANS_S = 15.0
"""What the ranks of an attempt have, once its first process has ended, to end with an error that says so."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Supervisor:
    """Runs one command, until it succeeds, is ended by a signal that was sent to this process, or fails for good.

    On Linux all that a failed attempt leaves is ended before the next begins, and the command gets a SIGTERM if this
    process is killed.

    Args:
        command: what to run.
        max_restarts: how often it is run again when it fails.
        name: of the command, in what is said.
    """

    def __init__(self, command: list[str], max_restarts: int, name: str) -> None:
        self._command, self._max_restarts, self._name = command, max_restarts, name
        self._process: subprocess.Popen[bytes] | None = None
        self._told_to_end = False
        self._libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None

    def run(self) -> int:
        """Run it, and return the exit status of the last attempt."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._pass_on)
        if self._libc is not None:
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with tempfile.TemporaryDirectory(prefix="lightning-stale-run-") as folder:
            for restart in range(self._max_restarts + 1):
                code = self._attempt(Path(folder), restart)
                if code == 0 or self._told_to_end:
                    break
                self._end_orphans()
                again = restart < self._max_restarts
                self._say(f"{how(code)}; " + (f"restart {restart + 1} of {self._max_restarts}" if again else "no more"))
        return code if code >= 0 else 128 - code

    def _attempt(self, folder: Path, restart: int) -> int:
        environment = {**os.environ, SUPERVISOR: f"{os.getpid()} {folder}", ATTEMPT: f"{restart}/{self._max_restarts}"}
        self._process = subprocess.Popen(self._command, env=environment, preexec_fn=self._ends_with_this_process())
        if self._told_to_end:  # a moment ago, when there was nobody to pass it on to
            self._process.terminate()
        return self._process.wait()

    def _ends_with_this_process(self) -> Callable[[], None] | None:
        if self._libc is None:
            return None
        libc, parent = self._libc, os.getpid()

        def ask_the_kernel() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        return ask_the_kernel

    def _pass_on(self, number: int, _: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._told_to_end = True
        if self._process is not None and not (number == signal.SIGINT and _is_of_the_terminal()):
            self._process.send_signal(number)

    def _end_orphans(self) -> None:
        """Wait for all that the attempt has started, and end what does not end; it is this process' by now."""
        if self._libc is None:
            return
        deadline = time.monotonic() + _ORPHANS_S
        while self._has_children():
            if time.monotonic() >= deadline:
                for pid in _children_of(os.getpid()):
                    os.kill(pid, signal.SIGKILL)  # ours, and not waited for: the number is nobody else's
            time.sleep(0.05)

    def _has_children(self) -> bool:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    def _say(self, what: str) -> None:
        print(f"lightning_stale: {self._name} {what}", file=sys.stderr, flush=True)


def how(code: int) -> str:
    """Return how a process with this exit code has ended.

    Example::

        >>> from lightning_stale.supervisor import how
        >>> how(-9), how(1)
        ('was killed by SIGKILL', 'ended with exit code 1')
    """
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def become_supervisor(arguments: Sequence[str]) -> NoReturn:
    """Become the process that supervises: this one has imported torch, which that one does without.

    Args:
        arguments: those of :func:`main`.
    """
    sys.stdout.flush()
    light = [sys.executable, *_flags_of_python(), "-X", "lightning_stale_server", "-m", "lightning_stale.supervisor"]
    os.execv(sys.executable, [*light, *arguments])  # noqa: S606


def _flags_of_python() -> list[str]:
    """Return the options of the interpreter that stand before ``-m`` in this process' command line."""
    return sys.orig_argv[1 : sys.orig_argv.index("-m")]


def _is_of_the_terminal() -> bool:
    """Whether Ctrl-C has gone to all of this process' group."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _children_of(parent: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent:
            children.append(int(path.parent.name))
    return children


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of restarts >= 0, e.g. --max-restarts 3")
    return int(text)


def main() -> None:
    """Supervise what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m lightning_stale run", description=__doc__.partition("\n")[0])
    parser.add_argument("--max-restarts", type=_number, default=3, help="how often it is run again (3)")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    flags = _flags_of_python()[:-2]  # but for what makes this process a light one
    command = [sys.executable, *flags, *(["-m"] if asked.module else []), asked.script, *asked.arguments]
    raise SystemExit(Supervisor(command, asked.max_restarts, asked.script).run())


if __name__ == "__main__":
    main()
