"""Know within seconds that another rank has failed, died or hangs."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_stale.failures import RunFailedError

_T = TypeVar("_T")
_BEAT_S = 0.5
_FAREWELL_S = 3.0
_MAX_POLL_S = 0.05


class _AwakeClock:
    """Seconds in which this process has not been suspended: Ctrl-Z, ``docker pause``, a scheduler that takes turns."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="awake", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_BEAT_S):
            now = time.monotonic()
            self.seconds += min(now - last, 2 * _BEAT_S)
            last = now


class Health:
    """Each rank lets the others know that it lives, and why it ends, through the rendezvous store.

    Only a thread talks to the store: where rank 0, which holds it, hangs, the store gives no answer.

    Args:
        store: of all ranks; used through a connection of its own.
        prefix: of the keys of this run.
        rank: this one.
        world_size: the number of ranks.
        patience_s: a rank that has not been heard of for so long, while this one was awake, hangs or is dead.
        check: called first by :meth:`check`; raises to break off.
    """

    def __init__(
        self, store: Store, prefix: str, rank: int, world_size: int, patience_s: float, check: Callable[[], None]
    ) -> None:
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._rank, self._world_size, self._patience_s, self._check = rank, world_size, patience_s, check
        self._others = [other for other in range(world_size) if other != rank]
        self._beats = 0
        self._known = False  # whether all that is looked for exists in the store
        self._clock = _AwakeClock()
        self._heard = dict.fromkeys(self._others, (b"", 0.0))  # the last beat, and when
        self._answered = 0.0
        self._failure: RunFailedError | None = None
        self._lost, self._closing = False, False
        self._questions: queue.Queue[tuple[Callable[[Store], Any], Future[Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> RunFailedError | None:
        """Why a rank has ended, if one has."""
        return self._failure

    def fail(self, kind: str, text: str) -> None:
        """Tell all others why this rank ends, unless another one was first."""
        self._ask_now(lambda store: self._tell(store, f"{kind}\n{text}"))

    def check(self, others: Sequence[int] | None = None, fresh: bool = False) -> None:
        """Raise if a rank has failed, or one of ``others`` (all, if not given) is not heard of any more.

        Args:
            others: the ranks that are waited for.
            fresh: ask the store now, and do not rely on what it said half a second ago.

        Raises:
            RunFailedError: says which, and why.
        """
        self._check()
        if fresh:
            self._ask_now(self._beat)
        if self._failure is not None:
            raise self._failure
        now = self._clock.seconds
        if self._lost or now - self._answered > self._patience_s:
            raise RunFailedError("error", "rank 0, which all others meet at, is gone: it was killed, or hangs")
        for rank, (_, heard) in self._heard.items():
            if now - heard > self._patience_s and (others is None or rank in others):
                text = f"rank {rank} has not been heard of for {self._patience_s:.0f} s: it was killed, or hangs"
                self.fail("error", text)
                raise self._failure or RunFailedError("error", text)  # the first one that was told

    def blame(self) -> None:
        """After a connection has broken, find out whose.

        Raises:
            RunFailedError: says which, and why; nothing is raised if all have been heard of.
        """
        deadline = self._clock.seconds + self._patience_s + 4 * _BEAT_S
        while self._clock.seconds < deadline:
            self.check(fresh=True)
            time.sleep(_BEAT_S / 10)

    def ask(self, question: Callable[[Store], _T]) -> _T:
        """Return what ``question`` finds in the store, as long as all ranks live.

        Raises:
            RunFailedError: as :meth:`check`.
        """
        answer = self._put(question)
        while True:
            try:
                return answer.result(timeout=_MAX_POLL_S)
            except concurrent.futures.TimeoutError:
                self.check()

    def close(self) -> None:
        """Stop the heartbeat; after a failure, rank 0 keeps the store until the others have read of it."""
        self._closing = True
        self._put(lambda _: None)
        self._thread.join(timeout=_FAREWELL_S + 1.0)
        self._clock.stop()

    def _ask_now(self, question: Callable[[Store], object]) -> None:
        if not self._lost:
            concurrent.futures.wait([self._put(question)], timeout=2.0)

    def _put(self, question: Callable[[Store], _T]) -> Future[_T]:
        answer: Future[_T] = Future()
        self._questions.put((question, answer))
        return answer

    def _run(self) -> None:
        try:
            if self._rank == 0:
                self._store.compare_set("failure", "", "")
                for other in self._others:
                    self._store.set(f"beats/{other}", "0")
            while not self._closing:
                self._beat(self._store)
                self._answer_until(time.monotonic() + _BEAT_S)
            self._beat(self._store)  # what has been said last
            if self._failure is not None:
                self._say_farewell()
        except RuntimeError:  # rank 0 has ended, and the store with it
            self._lost = not self._closing

    def _answer_until(self, deadline: float) -> None:
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            try:
                question, answer = self._questions.get(timeout=left)
            except queue.Empty:
                return
            answer.set_result(question(self._store))

    def _beat(self, store: Store) -> None:
        """Give a sign of life, and look for all others' in one request: the store serves all ranks."""
        self._beats += 1
        store.set(f"beats/{self._rank}", str(self._beats))
        keys = ["failure", *(f"beats/{other}" for other in self._others)]
        self._known = self._known or store.check(keys)  # which rank 0 makes; a request for what is not there waits
        if self._known:
            failure, *beats = store.multi_get(keys)
            self._note_failure(failure)
            for other, beat in zip(self._others, beats, strict=True):
                if beat != self._heard[other][0]:
                    self._heard[other] = (beat, self._clock.seconds)
        self._answered = self._clock.seconds

    def _tell(self, store: Store, report: str) -> None:
        self._note_failure(store.compare_set("failure", "", report))  # returns that of who was first
        self._beat(store)

    def _note_failure(self, report: bytes) -> None:
        if self._failure is None and report:
            kind, _, text = report.decode().partition("\n")
            self._failure = RunFailedError(kind, text)

    def _say_farewell(self) -> None:
        self._store.add("farewells", 1)
        deadline = time.monotonic() + _FAREWELL_S
        while self._rank == 0 and self._store.add("farewells", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
