"""See that all ranks meet at the same place, before they wait for each other there."""

from __future__ import annotations

import time

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed.distributed_c10d import Store

from lightning_stale.coordinator.meetings import different_places
from lightning_stale.health import Health

_POLL_S = 0.001
_MAX_POLL_S = 0.05


class Places:
    """Where each rank is, and will wait for the others; told through the store that ``health`` looks after.

    Args:
        health: of this run.
        rank: this one.
        world_size: the number of ranks.
    """

    def __init__(self, health: Health, rank: int, world_size: int) -> None:
        self._health, self._rank, self._world_size = health, rank, world_size
        self._meetings = 0

    def come_to(self, place: str, step: int) -> None:
        """Let the others know that this rank's next meeting is at ``place``; do not wait for them yet."""
        self._meetings += 1
        new, read_by_all = self._key(self._meetings, self._rank), self._key(self._meetings - 2, self._rank)
        counter, left_by_all = self._key(self._meetings, "count"), self._key(self._meetings - 2, "count")

        def move(store: Store) -> None:
            store.set(new, f"{place} (step {step})")
            store.delete_key(read_by_all)
            store.add(counter, 1)
            if self._rank == 0:
                store.delete_key(left_by_all)

        self._health.ask(move)

    def await_others(self) -> None:
        """Wait until all ranks have come to this meeting.

        Raises:
            MisconfigurationException: if some of them are at another place.
            RunFailedError: if one of them has ended.
        """
        poll_s = _POLL_S
        while self._health.ask(self._count) < self._world_size:
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)
            self._health.check()
        places = dict(enumerate(self._health.ask(self._read)))
        if _differ(places):
            raise MisconfigurationException(different_places({rank: _parsed(place) for rank, place in places.items()}))

    def _count(self, store: Store) -> int:
        """Return how many have come: one request, as often as it is asked for."""
        return int(store.add(self._key(self._meetings, "count"), 0))

    def _read(self, store: Store) -> list[str]:
        keys = [self._key(self._meetings, rank) for rank in range(self._world_size)]
        return [place.decode() for place in store.multi_get(keys)]

    @staticmethod
    def _key(meeting: int, rank: int | str) -> str:
        return f"place/{meeting}/{rank}"


def _differ(places: dict[int, str]) -> bool:
    return len({place.rpartition(" (")[0] for place in places.values()}) > 1


def _parsed(told: str) -> tuple[str, str]:
    place, _, detail = told.rpartition(" (")
    return place, detail.removesuffix(")")
