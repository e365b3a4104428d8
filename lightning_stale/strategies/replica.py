"""One replica of a model over several ranks: what they must agree on."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from lightning_stale.pipeline.ownership import gather_everywhere
from lightning_stale.strategies import internals
from lightning_stale.strategies.peers import PeerStrategy

TBroadcast = TypeVar("TBroadcast")


class SingleReplicaStrategy(PeerStrategy):
    """Ranks that hold one model together: they see the same batches, and rank 0 has the loss and the metrics."""

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
                health, work = self._health, internals.asynchronous_barrier(self.root_device)
                self._guard(lambda: health.wait(work))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Take the decision of rank 0, where the metrics are."""
        return bool(self.broadcast(decision))
