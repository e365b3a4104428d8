"""One replica of a model over several ranks: what they must agree on, and how they learn of each other's failures."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

from torch import Tensor

from lightning_stale.failures import describe
from lightning_stale.pipeline.health import Health, StageFailedError
from lightning_stale.pipeline.ownership import gather_everywhere
from lightning_stale.strategies import internals
from lightning_stale.strategies.base import StaleStrategy

_PATIENCE_S = 15.0

TBroadcast = TypeVar("TBroadcast")


class SingleReplicaStrategy(StaleStrategy):
    """Ranks that hold one model together: they see the same batches, and rank 0 has the loss and the metrics."""

    _health: Health | None = None
    _reported: BaseException | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One replica: every rank sees all batches."""
        return {"num_replicas": 1, "rank": 0}

    # --- collectives ------------------------------------------------------------------------------------------------

    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the replicas, of which there is one."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather over the replicas, of which there is one."""
        return tensor.unsqueeze(0)

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Broadcast once all ranks are there."""
        self._gather_ranks()
        return super().broadcast(obj, src)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all ranks are there."""
        self._gather_ranks()

    def _gather_everywhere(self, value: Any) -> list[Any]:
        self._gather_ranks()
        return gather_everywhere(value)

    def _gather_ranks(self) -> None:
        """Wait, before a collective, until all ranks are there; the collective itself would wait for a dead one."""
        if self.world_size > 1:
            if self._health is None:
                super().barrier()
            else:
                self._health.wait(internals.asynchronous_barrier(self.root_device))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Take the decision of rank 0, where the metrics are."""
        return bool(self.broadcast(decision))

    # --- failures ---------------------------------------------------------------------------------------------------

    def _start_health(self) -> Health:
        prefix = f"lightning_stale/{self.broadcast(uuid.uuid4().hex)}"
        store = internals.rendezvous_store()
        self._health = Health(store, prefix, self.global_rank, self.world_size, _PATIENCE_S, self._check_signals)
        return self._health

    def _end_health(self) -> None:
        if self._health is not None:
            self._health.close()
            self._health = None

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks; in ``fit`` they have been told already, before any other callback."""
        self.report(exception)

    def report(self, exception: BaseException) -> None:
        if self._health is None or isinstance(exception, StageFailedError) or exception is self._reported:
            return
        self._reported = exception
        first = self._health.failure
        if first is not None:
            exception.__cause__ = exception.__cause__ or first
            return
        kind, text = describe(exception)
        self._health.fail(kind, f"rank {self.global_rank} {text}")
