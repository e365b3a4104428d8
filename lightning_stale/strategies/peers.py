"""What strategies share whose ranks talk to each other directly, without a server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_stale.failures import RunFailedError, describe
from lightning_stale.health import Health
from lightning_stale.strategies import internals
from lightning_stale.strategies.base import StaleStrategy

_T = TypeVar("_T")
_PATIENCE_S = 20.0
_CHECK_S = 0.5
_POLL_S = 0.001
_MAX_POLL_S = 0.05


class PeerStrategy(StaleStrategy):
    """Ranks that learn of each other's failures, and where the others are, through the rendezvous store."""

    _health: Health | None = None
    _meetings = 0
    _checked = 0.0

    def _start_health(self) -> None:
        prefix = f"lightning_stale/{self.broadcast(uuid.uuid4().hex)}"
        store = internals.rendezvous_store()
        self._health = Health(store, prefix, self.global_rank, self.world_size, _PATIENCE_S)
        self._meetings, self._checked = 0, time.monotonic()

    def _guard(self, call: Callable[[], _T]) -> _T:
        """Run ``call``, which may wait; what breaks because of another rank raises what happened there."""

        def blaming() -> _T:
            try:
                return call()
            except RuntimeError as error:
                if self._health is not None and internals.is_lost_connection(error):
                    self._health.blame()
                raise

        return super()._guard(blaming)

    def report(self, exception: BaseException) -> None:
        if self._health is None or isinstance(exception, RunFailedError):
            return
        try:
            if internals.is_lost_connection(exception):
                self._health.blame()
            first = self._health.failure()
        except RunFailedError as error:
            first = error
        except RuntimeError:  # the store is gone, and rank 0 with it
            return
        if first is not None:  # the reason for this one
            exception.__cause__ = exception.__cause__ or first
            return
        kind, text = describe(exception)
        self._health.fail(kind, f"rank {self.global_rank} {text}")

    def teardown(self) -> None:
        if self._health is not None:
            self._health.close()
            self._health = None
        super().teardown()

    def _check_peers(self) -> None:
        """Look after the others every half second; called again and again while this rank trains or waits."""
        assert self._health is not None
        self._check_signals()
        if time.monotonic() - self._checked > _CHECK_S:
            self._checked = time.monotonic()
            self._health.check()

    # --- where the others are ---------------------------------------------------------------------------------------

    def _before_collective(self, name: str, group: Any | None = None) -> None:
        """Meet first: the collective itself would wait for its timeout, or speak of a broken connection."""
        if self._health is None or self.world_size == 1 or group is not None or self._require_trainer().interrupted:
            return
        self._come_to(f"a collective operation ({name})")
        self._guard(self._await_others)

    def _come_to(self, place: str) -> None:
        """Let the others know that this rank's next meeting is at ``place``."""
        assert self._health is not None
        self._meetings += 1
        here = f"{place} (step {self._require_trainer().global_step})"
        self._health.store.set(self._key(self._meetings, self.global_rank), here)
        self._health.store.delete_key(self._key(self._meetings - 2, self.global_rank))  # all have read that one

    def _await_others(self) -> None:
        """Wait until all ranks have come to this meeting, and see that it is at the same place."""
        poll_s = _POLL_S
        while not self._all_are_here():
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)
            self._check_peers()

    def _all_are_here(self) -> bool:
        """Whether all ranks have come to this meeting.

        Raises:
            MisconfigurationException: if some of them are at another place.
        """
        assert self._health is not None
        store, keys = self._health.store, [self._key(self._meetings, rank) for rank in range(self.world_size)]
        places = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
        if len({place.rpartition(" (")[0] for place in places.values()}) > 1:
            described = "; ".join(f"rank {rank} is at {place}" for rank, place in places.items())
            raise MisconfigurationException(
                f"the workers met at different places: {described}. Validation and checkpoints within an epoch need "
                "the same number of batches on every rank: validate and save at the end of an epoch "
                "(val_check_interval=1.0, every_n_train_steps=None), or write Trainer(limit_train_batches=...)"
            )
        return len(places) == self.world_size

    @staticmethod
    def _key(meeting: int, rank: int) -> str:
        return f"place/{meeting}/{rank}"
