"""All stages of a replica see the same batches in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, SequentialSampler


class SharedOrder(Sampler[Any]):
    """The order that rank 0 draws from ``sampler``, on every rank; one broadcast per epoch."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        order = [list(self.sampler) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(order, src=0)
        assert order[0] is not None
        return iter(order[0])

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


def share_order(loader: Any) -> None:
    """Make ``loader``, if it draws a random order, take that of rank 0 (in place; its batch sampler stays)."""
    if not isinstance(loader, DataLoader):
        return
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if sampler is not None and not isinstance(sampler, (SequentialSampler, SharedOrder)):
        loader.batch_sampler.sampler = SharedOrder(sampler)  # type: ignore[union-attr]
