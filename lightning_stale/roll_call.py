"""Wait until all ranks have come, for as long as they live: a collective would wait for its timeout, and no longer."""

from __future__ import annotations

import time

from torch.distributed.distributed_c10d import Store

from lightning_stale.health import Health

_POLL_S = 0.0005
_MAX_POLL_S = 0.05


class RollCall:
    """Counts who has come, in the store that ``health`` looks after; there is one of it on each rank.

    Args:
        health: of this run.
        rank: this one.
        world_size: the number of ranks.
    """

    def __init__(self, health: Health, rank: int, world_size: int) -> None:
        self._health, self._rank, self._world_size = health, rank, world_size
        self._calls = 0

    def wait(self) -> None:
        """Return once all ranks have called this as often as this one.

        Raises:
            RunFailedError: if one of them has ended.
        """
        self._calls += 1
        key, left_by_all = f"roll-call/{self._calls}", f"roll-call/{self._calls - 2}"

        def come(store: Store) -> int:
            if self._rank == 0:
                store.delete_key(left_by_all)
            return int(store.add(key, 1))

        present, pause = self._health.ask(come), _POLL_S
        while present < self._world_size:
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_S)
            self._health.check()
            present = self._health.ask(lambda store: int(store.add(key, 0)))
