"""One replica of a model over several ranks: what they must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from lightning_stale.strategies.peers import PeerStrategy
from lightning_stale.transport.groups import gather_everywhere

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
        broadcast = super().broadcast
        with self._all_ranks():
            return self._guard(lambda: broadcast(obj, src))  # one of them may fail in it, on what cannot be pickled

    def barrier(self, name: str | None = None) -> None:
        """Wait until all ranks are there."""
        with self._all_ranks():
            if self._roll_call is None:
                super().barrier(name)

    def _gather_everywhere(self, value: Any) -> list[Any]:
        with self._all_ranks():
            return self._guard(lambda: gather_everywhere(value))

    @contextmanager
    def _all_ranks(self) -> Iterator[None]:
        """Enter, for a collective, once all ranks are there; the collective itself would wait for a dead one."""
        with self._quiet():
            if self._roll_call is not None:
                self._guard(self._roll_call.wait)
            with self._ending_alike():
                yield

    def _quiet(self) -> AbstractContextManager[None]:
        """Return what a collective runs in that nothing else on the device may meet."""
        return nullcontext()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Take the decision of rank 0, where the metrics are."""
        return bool(self.broadcast(decision))
