"""Ranks that die while an elastic fit runs are replaced by whoever has started them."""

from __future__ import annotations

import atexit
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping

JOIN = "LIGHTNING_STALE_JOIN"
"""Names the rank whose place a process takes in the fit that runs; -1: it is a further one."""

Start = Callable[[int, Mapping[str, str]], "subprocess.Popen[bytes]"]
"""Starts the process of a local rank, as the first one, with further environment variables."""

_POLL_S = 0.2
_VERDICT_S = 1.0
"""A worker whose own error ends the run for all has told so before its process ends; give it this long to arrive."""
_GRACE_S = 10.0
"""What the others have, once the fit has failed here, to hear of it and end by themselves."""

log = logging.getLogger(__name__)


def how_it_ended(code: int) -> str:
    """Return what the exit code of a process says, to follow its name."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Replacements:
    """Watches the processes that this one has started, from now until all of them or this one have ended.

    Outside of an elastic fit they end together, as ever.

    Args:
        processes: by local rank; what is here is always the newest.
        start: starts one more.
        first_rank: the global rank of local rank 0.
        check: called now and then outside of an elastic fit: ends all if one has failed, and returns whether nothing is
            left to watch.
    """

    def __init__(
        self,
        processes: dict[int, subprocess.Popen[bytes]],
        start: Start,
        first_rank: int,
        check: Callable[[], bool] = lambda: False,
    ) -> None:
        self._processes, self._start, self._check = processes, start, check
        self._ranks = {local_rank: first_rank + local_rank for local_rank in processes}
        self._lock = threading.Lock()
        self._runs = False  # an elastic fit
        self._left, self._why_none = 0, ""
        self._seen: dict[int, float] = {}  # when a process was first seen to have ended
        self._deadline: float | None = None  # of those who are to end, as the fit has failed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="replacements", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The newest of each rank."""
        with self._lock:
            return list(self._processes.values())

    @property
    def tolerates(self) -> bool:
        """Whether one may die now."""
        return self._runs

    def begin(self, restarts: int, why_none: str, first_rank: int | None = None) -> None:
        """An elastic fit runs from now on.

        Args:
            restarts: how many are replaced at most.
            why_none: said of the first one that is not.
            first_rank: the global rank of local rank 0, if those who are left are counted anew.
        """
        with self._lock:
            if first_rank is not None:
                self._ranks = {one: first_rank + place for place, one in enumerate(sorted(self._processes), 1)}
            self._left, self._why_none, self._runs = restarts, why_none, True

    def end(self, present: Collection[int]) -> None:
        """The fit is over; who has taken no part in its end has not come in time, and goes.

        Args:
            present: the global ranks of those who have.
        """
        with self._lock:
            if self._runs:
                self._runs = False
                for local_rank, process in list(self._processes.items()):
                    if self._ranks[local_rank] not in present:
                        process.kill()
                        process.wait()
                        del self._processes[local_rank]

    def fail(self) -> None:
        """The fit has failed here: the others are told, and who does not end by that is killed a little later."""
        with self._lock:
            if self._runs:
                self._runs, self._deadline = False, time.monotonic() + _GRACE_S

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        if self._deadline is not None:
            self._thread.join()  # which ends when nobody is left
        self.close()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            with self._lock:
                if self._runs:
                    for local_rank, process in list(self._processes.items()):
                        self._look_at(local_rank, process)
                elif self._deadline is not None:
                    self._end_all(self._deadline)
                elif self._check():
                    self._ended.set()

    def _look_at(self, local_rank: int, process: subprocess.Popen[bytes]) -> None:
        code, now = process.poll(), time.monotonic()
        if code is None or (code > 0 and now < self._seen.setdefault(process.pid, now) + _VERDICT_S):
            return
        del self._processes[local_rank]
        rank = self._ranks[local_rank]
        lost = f"rank {rank} (process {process.pid}) {how_it_ended(code)}"
        if code == 0:
            return
        if self._left == 0:
            log.warning("%s, and is not replaced: %s", lost, self._why_none)
            return
        self._left -= 1
        new = self._processes[local_rank] = self._start(local_rank, {JOIN: str(rank)})
        left = f"{self._left} replacements are left" if self._left != 1 else "1 replacement is left"
        log.warning("%s: process %d takes its place, %s", lost, new.pid, left if self._left else "the last replacement")

    def _end_all(self, deadline: float) -> None:
        alive = [process for process in self._processes.values() if process.poll() is None]
        if alive and time.monotonic() < deadline:
            return
        for process in alive:
            process.kill()
            process.wait()
        self._ended.set()
