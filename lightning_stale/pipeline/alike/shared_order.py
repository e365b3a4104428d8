"""All stages of a replica see the same batches in the same order."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler

from lightning_stale.pipeline.alike.random_state import RandomState


class SharedOrder(Sampler[Any]):
    """The order that rank 0 draws from ``sampler``, on every rank; one broadcast per epoch.

    It is drawn whole: within an epoch a stage may wait for another one's gradients, and for no collective besides.

    Raises:
        TypeError: for a sampler without a length, which may have no end.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        if not hasattr(sampler, "__len__"):
            raise TypeError(
                f"{type(sampler).__name__} has no __len__, and its order is drawn whole for all stages: define "
                "__len__, e.g. the number of samples of an epoch, or write an IterableDataset"
            )
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return self._shared(iter(self.sampler) if dist.get_rank() == 0 else iter(()))

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def _shared(self, draws: Iterator[Any]) -> Iterator[Any]:
        order = list(islice(draws, len(self)))  # as late as without sharing, for the same random numbers
        shared = [(order, RandomState.now())]
        dist.broadcast_object_list(shared, src=0)
        order, drawn = shared[0]
        drawn.restore()  # the others have drawn no order: what follows is the same for all of them
        yield from order
        deque(draws, maxlen=0)  # who asks beyond the end makes a sampler of torch's draw once more


def share_order(loader: DataLoader[Any], batches: Any) -> Callable[[], None]:
    """Make ``loader``, if it draws a random order, take that of rank 0 (in place).

    Args:
        loader: of any kind; one over an ``IterableDataset`` has no order to share.
        batches: its batch sampler, or ``None``.

    Returns:
        What gives the loader, which is the user's, its own order back, if it is still there.
    """
    holder: Any = batches if type(batches) is BatchSampler else loader
    name = "sampler" if batches is None or holder is batches else "batch_sampler"  # which draws in a way of its own
    drawn = getattr(holder, name)
    if isinstance(loader.dataset, IterableDataset) or isinstance(drawn, (SequentialSampler, SharedOrder)):
        return lambda: None
    vars(holder)[name] = SharedOrder(drawn)  # a DataLoader refuses the assignment
    reference = weakref.ref(holder)  # loaders that are made for each epoch must go, and their workers with them

    def undo() -> None:
        there = reference()
        if there is not None:
            vars(there)[name] = getattr(there, name).sampler

    return undo
