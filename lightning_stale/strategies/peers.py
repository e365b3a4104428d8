"""What strategies share whose ranks talk to each other directly, without a server."""

from __future__ import annotations

import uuid

from lightning_stale.failures import RunFailedError, describe
from lightning_stale.health import Health
from lightning_stale.strategies import internals
from lightning_stale.strategies.base import StaleStrategy

_PATIENCE_S = 20.0


class PeerStrategy(StaleStrategy):
    """Ranks that learn of each other's failures through the rendezvous store."""

    _health: Health | None = None

    def _start_health(self) -> Health:
        prefix = f"lightning_stale/{self.broadcast(uuid.uuid4().hex)}"
        store = internals.rendezvous_store()
        self._health = Health(store, prefix, self.global_rank, _PATIENCE_S, self._check_signals)
        return self._health

    def report(self, exception: BaseException) -> None:
        if self._health is None or isinstance(exception, RunFailedError):
            return
        first = self._health.failure()
        if first is not None:  # mostly the reason for this one, a broken connection say
            exception.__cause__ = exception.__cause__ or first
            return
        kind, text = describe(exception)
        self._health.fail(kind, f"rank {self.global_rank} {text}")

    def teardown(self) -> None:
        if self._health is not None:
            self._health.close()
            self._health = None
        super().teardown()
