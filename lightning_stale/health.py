"""Know within seconds that another rank has failed, died or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_stale.failures import RunFailedError

_BEAT_S = 1.0


class Health:
    """Each rank lets the others know that it lives, and why it ends, through the rendezvous store.

    Args:
        store: of all ranks; used through connections of its own.
        rank: this one.
        patience_s: a rank that has not been heard of for so long hangs or is dead.
        check: called first by :meth:`check`; raises to break off.
    """

    def __init__(self, store: Store, prefix: str, rank: int, patience_s: float, check: Callable[[], None]) -> None:
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._beats = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._rank, self._patience_s, self._check = rank, patience_s, check
        self._heard: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def fail(self, kind: str, text: str) -> None:
        """Tell all others why this rank ends, unless another one was first."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", f"{kind}\n{text}")

    def failure(self) -> RunFailedError | None:
        """Return why a rank has ended, if one has."""
        if not self._store.check(["failure"]):
            return None
        kind, _, text = self._store.get("failure").decode().partition("\n")
        return RunFailedError(kind, text)

    def check(self, others: Sequence[int]) -> None:
        """Raise if a rank has failed, or one of ``others`` is not heard of any more.

        Raises:
            RunFailedError: says which, and why.
        """
        self._check()
        try:
            failure = self.failure()
            silent = [rank for rank in others if self._is_silent(rank)]
        except RuntimeError as error:  # the store is rank 0's
            raise RunFailedError("error", "rank 0 is gone: it was killed or has crashed") from error
        if failure is not None:
            raise failure
        if silent:
            text = f"rank {silent[0]} has not been heard of for {self._patience_s:.0f} s: it was killed, or hangs"
            self.fail("error", text)
            raise RunFailedError("error", text)

    def close(self) -> None:
        """Stop the heartbeat."""
        self._stop.set()
        self._thread.join(timeout=2 * _BEAT_S)

    def _is_silent(self, rank: int) -> bool:
        beats, now = int(self._store.add(f"beats/{rank}", 0)), time.monotonic()
        if self._heard.get(rank, (-1, now))[0] != beats:
            self._heard[rank] = (beats, now)
        return now - self._heard[rank][1] > self._patience_s

    def _beat(self) -> None:
        try:
            while not self._stop.wait(_BEAT_S):
                self._beats.add(f"beats/{self._rank}", 1)
        except RuntimeError:  # rank 0 has ended, and the store with it
            return
