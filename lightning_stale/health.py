"""Know within seconds that another rank has failed, died or hangs."""

from __future__ import annotations

import threading
import time

from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_stale.failures import RunFailedError

_BEAT_S = 1.0
_LINGER_S = 3 * _BEAT_S


class Health:
    """Each rank lets the others know that it lives, and why it ends, through the rendezvous store.

    Args:
        store: of all ranks; used through connections of its own.
        prefix: of the keys of this run.
        rank: this one.
        world_size: the number of ranks.
        patience_s: a rank that has not been heard of for so long hangs or is dead.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world_size: int, patience_s: float) -> None:
        self.store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._beats = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._rank, self._world_size, self._patience_s = rank, world_size, patience_s
        self._heard: dict[int, tuple[int, float]] = {}
        self._failure: RunFailedError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def fail(self, kind: str, text: str) -> None:
        """Tell all others why this rank ends, unless another one was first."""
        if self.store.add("failures", 1) == 1:
            self.store.set("failure", f"{kind}\n{text}")

    def failure(self) -> RunFailedError | None:
        """Return why a rank has ended, if one has."""
        if self._failure is None:
            self._failure = self._read_failure(self.store)
        return self._failure

    def check(self) -> None:
        """Raise if a rank has failed, or is not heard of any more.

        Raises:
            RunFailedError: says which, and why.
        """
        try:
            failure = self.failure()
            silent = [rank for rank in range(self._world_size) if rank != self._rank and self._is_silent(rank)]
        except RuntimeError as error:  # the store is rank 0's
            raise RunFailedError("error", "rank 0 is gone: it was killed or has crashed") from error
        if failure is not None:
            raise failure
        if silent:
            text = f"rank {silent[0]} has not been heard of for {self._patience_s:.0f} s: it was killed, or hangs"
            self.fail("error", text)
            raise RunFailedError("error", text)

    def blame(self) -> None:
        """After a connection has broken, find out whose.

        Raises:
            RunFailedError: says which, and why; nothing is raised if all have been heard of.
        """
        deadline = time.monotonic() + self._patience_s + 2 * _BEAT_S
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_BEAT_S / 10)

    def close(self) -> None:
        """Stop the heartbeat; after a failure, when all have heard of it: the store may end with this rank."""
        deadline = time.monotonic() + _LINGER_S
        while not self._all_know() and time.monotonic() < deadline:
            time.sleep(_BEAT_S / 10)
        self._stop.set()
        self._thread.join(timeout=2 * _BEAT_S)

    def _all_know(self) -> bool:
        try:
            return self.failure() is None or int(self.store.add("know", 0)) == self._world_size
        except RuntimeError:  # the store is gone
            return True

    def _is_silent(self, rank: int) -> bool:
        beats, now = int(self.store.add(f"beats/{rank}", 0)), time.monotonic()
        if self._heard.get(rank, (-1, now))[0] != beats:
            self._heard[rank] = (beats, now)
        return now - self._heard[rank][1] > self._patience_s

    def _beat(self) -> None:
        knows = False
        try:
            while not self._stop.wait(_BEAT_S):
                self._beats.add(f"beats/{self._rank}", 1)
                failure = self._read_failure(self._beats)
                if failure is not None and not knows:
                    self._failure, knows = failure, True
                    self._beats.add("know", 1)
        except RuntimeError:  # rank 0 has ended, and the store with it
            return

    @staticmethod
    def _read_failure(store: Store) -> RunFailedError | None:
        if not store.check(["failure"]):
            return None
        kind, _, text = store.get("failure").decode().partition("\n")
        return RunFailedError(kind, text)
