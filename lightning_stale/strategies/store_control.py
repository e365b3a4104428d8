"""Meetings and failures over the rendezvous store, for ranks without a server."""

from __future__ import annotations

import atexit
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

from lightning_stale.failures import RunFailedError
from lightning_stale.health import Health
from lightning_stale.strategies.places import Places

_PATIENCE_S = 15.0


class StoreControl:
    """A :class:`~lightning_stale.strategies.other_ranks.Control`.

    Args:
        store: of all ranks.
        run: a name that no other run has, the same on all ranks.
        rank: this one.
        world_size: the number of ranks.
        check: called while waiting; raises to break off.
    """

    def __init__(self, store: Store, run: str, rank: int, world_size: int, check: Callable[[], None]) -> None:
        self._rank = rank
        self._health = Health(store, f"lightning_stale/{run}", rank, world_size, _PATIENCE_S, check)
        self._places = Places(self._health, rank, world_size)
        atexit.register(self._health.close)

    @property
    def failure(self) -> RunFailedError | None:
        return self._health.failure

    def check(self, fresh: bool = False) -> None:
        self._health.check(fresh=fresh)

    def blame(self) -> None:
        self._health.blame()

    def come_to(self, place: str, detail: str) -> None:
        self._places.come_to(place, detail)

    def await_others(self) -> None:
        self._places.await_others()

    def meet(self, place: str, detail: str = "") -> None:
        self.come_to(place, detail)
        self.await_others()

    def fail(self, kind: str, text: str) -> RunFailedError | None:
        self._health.fail(kind, f"rank {self._rank} {text}")
        return None

    def close(self, finished: bool) -> None:
        atexit.unregister(self._health.close)
        self._health.close()
