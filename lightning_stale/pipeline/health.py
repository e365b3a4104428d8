"""Know within seconds that another stage has failed, died or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torch.distributed.distributed_c10d import PrefixStore, Store, Work

_BEAT_S = 0.5
_FAREWELL_S = 3.0


class StageFailedError(RuntimeError):
    """Another stage has failed; the text holds its traceback."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        """``"error"``, ``"interrupt"`` (Ctrl-C) or ``"sigterm"``."""

    def __reduce__(self) -> tuple[type[StageFailedError], tuple[str, str]]:
        return type(self), (self.kind, str(self))


class Health:
    """Each rank lets the others know that it lives, and why it ends, through the rendezvous store.

    Only a thread talks to the store: where rank 0, which holds it, hangs, the store gives no answer.

    Args:
        store: of all ranks; used through a connection of its own.
        rank: this one.
        world_size: the number of ranks.
        patience_s: a rank that has not been heard of for so long hangs or is dead.
        check: called first by :meth:`check`; raises to break off.
    """

    def __init__(
        self, store: Store, prefix: str, rank: int, world_size: int, patience_s: float, check: Callable[[], None]
    ) -> None:
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._rank, self._world_size, self._patience_s, self._check = rank, world_size, patience_s, check
        self._heard = {other: (-1, time.monotonic()) for other in range(world_size) if other != rank}
        self._answered = time.monotonic()
        self._report: str | None = None
        self._failure: StageFailedError | None = None
        self._lost = False
        self._wake, self._closing, self._beaten = threading.Event(), False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> StageFailedError | None:
        """Why a rank has ended, if one has."""
        return self._failure

    def fail(self, kind: str, text: str) -> None:
        """Tell all others why this rank ends, unless another one was first."""
        self._report = f"{kind}\n{text}"
        self._beat_now()

    def check(self, others: Sequence[int] | None = None, fresh: bool = False) -> None:
        """Raise if a rank has failed, or one of ``others`` (all, if not given) is not heard of any more.

        Args:
            others: the ranks that are waited for.
            fresh: ask the store now, and do not rely on what it said half a second ago.

        Raises:
            StageFailedError: says which, and why.
        """
        self._check()
        if fresh:
            self._beat_now()
        if self._failure is not None:
            raise self._failure
        now = time.monotonic()
        if self._lost or now - self._answered > self._patience_s:
            raise StageFailedError("error", "rank 0, which holds the last stage, is gone: it was killed, or hangs")
        for rank, (_, heard) in self._heard.items():
            if now - heard > self._patience_s and (others is None or rank in others):
                text = f"rank {rank} has not been heard of for {self._patience_s:.0f} s: it was killed, or hangs"
                self.fail("error", text)
                raise StageFailedError("error", text)

    def wait(self, work: Work) -> None:
        """Wait for a collective, as long as all ranks live.

        Raises:
            StageFailedError: as :meth:`check`.
        """
        pause = 1e-4
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            self.check()
        work.wait()

    def close(self) -> None:
        """Stop the heartbeat; after a failure, rank 0 keeps the store until the others have read of it."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=_FAREWELL_S + 1.0)

    def _beat_now(self) -> None:
        self._beaten.clear()
        self._wake.set()
        self._beaten.wait(timeout=2.0)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._beat()
                self._beaten.set()
                self._wake.wait(_BEAT_S)
                self._wake.clear()
            if self._failure is not None:
                self._say_farewell()
        except RuntimeError:  # rank 0 has ended, and the store with it
            self._lost = not self._closing
            self._beaten.set()

    def _beat(self) -> None:
        self._store.add(f"beats/{self._rank}", 1)
        if self._report is not None and self._store.add("failures", 1) == 1:
            self._store.set("failure", self._report)
        self._report = None
        if self._failure is None and self._store.check(["failure"]):
            kind, _, text = self._store.get("failure").decode().partition("\n")
            self._failure = StageFailedError(kind, text)
        for rank, (beats, _) in self._heard.items():
            now = int(self._store.add(f"beats/{rank}", 0))
            if now != beats:
                self._heard[rank] = (now, time.monotonic())
        self._answered = time.monotonic()

    def _say_farewell(self) -> None:
        self._store.add("farewells", 1)
        deadline = time.monotonic() + _FAREWELL_S
        while self._rank == 0 and self._store.add("farewells", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
