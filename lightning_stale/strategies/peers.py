"""What strategies share whose ranks talk to each other directly, without a server."""

from __future__ import annotations

import atexit
import uuid
from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_stale.failures import RunFailedError, describe
from lightning_stale.health import Health
from lightning_stale.private import of_torch
from lightning_stale.roll_call import RollCall
from lightning_stale.strategies.base import StaleStrategy

_T = TypeVar("_T")
_PATIENCE_S = 15.0


class PeerStrategy(StaleStrategy):
    """Ranks that learn of each other's failures through the rendezvous store."""

    _health: Health | None = None
    _roll_call: RollCall | None = None
    _reported: BaseException | None = None

    def _start_health(self) -> Health:
        prefix = f"lightning_stale/{self.broadcast(uuid.uuid4().hex)}"
        store = of_torch.rendezvous_store()
        self._health = Health(store, prefix, self.global_rank, self.world_size, _PATIENCE_S, self._check_signals)
        self._roll_call = RollCall(self._health, self.global_rank, self.world_size)
        atexit.register(self._end_health)
        return self._health

    def _end_health(self) -> None:
        atexit.unregister(self._end_health)
        health, self._health, self._roll_call = self._health, None, None
        if health is not None:
            health.close()

    def _guard(self, call: Callable[[], _T]) -> _T:
        """Run ``call``, which may wait; what breaks because of another rank raises what happened there."""

        def blaming() -> _T:
            try:
                return call()
            except RuntimeError as error:
                if self._health is not None and of_torch.is_lost_connection(error):
                    self._health.blame()
                raise

        return super()._guard(blaming)

    def _check_peers(self) -> None:
        """Called again and again while this rank trains or waits."""
        assert self._health is not None
        self._guard(self._health.check)

    def _told(self) -> RunFailedError | None:
        if self._health is not None:
            try:
                self._health.check(fresh=True)
            except RunFailedError as failure:
                return failure
        return None

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks; in ``fit`` they have been told already, before any other callback."""
        self.report(exception)
        super().on_exception(exception)

    def report(self, exception: BaseException) -> None:
        if self._health is None or isinstance(exception, RunFailedError) or exception is self._reported:
            return
        self._reported = exception
        try:
            if of_torch.is_lost_connection(exception):
                self._health.blame()
            first = self._health.failure
        except RunFailedError as error:
            first = error
        except SIGTERMException:  # this rank is to end as well; the others hear of what it raises
            first = self._health.failure
        kind, text = describe(exception)
        if first is not None:  # the reason for this one, but for a signal that has come here as well
            if kind == "error":
                exception.__cause__ = exception.__cause__ or first
            return
        self._health.fail(kind, f"rank {self.global_rank} {text}")

    def teardown(self) -> None:
        self._end_health()
        super().teardown()
