"""A loader whose batches come in the order in which this worker is granted them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

NextBatch = Callable[[Sequence[Sequence[int]]], Sequence[int]]


def why_not(loader: object) -> str | None:
    """Return why the batches of ``loader`` cannot be handed out, as the end of a sentence; ``None`` if they can.

    Lightning has put in its own sampler by then, where it does.
    """
    if type(loader) is not DataLoader:
        return f"the training loader is a {type(loader).__name__} and not a torch.utils.data.DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "the training data is iterable: nobody but itself knows what comes next"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"the training loader has a {type(loader.batch_sampler).__name__} for a batch sampler"
    if type(loader.sampler) is not DistributedSampler:
        return f"the training loader has a {type(loader.sampler).__name__}, where Lightning would put its own"
    return None


def too_few(loader: DataLoader[Any], workers: int) -> str | None:
    """Return what is wrong if there are fewer batches in an epoch than ``workers``."""
    batches = len(loader.batch_sampler)  # type: ignore[arg-type]
    return f"{batches} batches cannot be shared by {workers} workers" if batches < workers else None


def with_shards(loader: object, shares: dict[str, Any]) -> object:
    """Let ``loader``, whose sampler Lightning has made for one replica, have the shard of this worker.

    Args:
        loader: any; left alone if Lightning has put no sampler into it.
        shares: ``num_replicas`` and ``rank``.
    """
    samplers = (getattr(holder, "sampler", None) for holder in (loader, getattr(loader, "batch_sampler", None)))
    for one in {id(sampler): sampler for sampler in samplers if isinstance(sampler, DistributedSampler)}.values():
        DistributedSampler.__init__(
            one, one.dataset, shuffle=one.shuffle, seed=one.seed, drop_last=one.drop_last, **shares
        )
    return loader


class OnDemandLoader:
    """What Lightning iterates over: as many batches as shards would give, and which they are is said one by one.

    Args:
        loader: the user's, with Lightning's sampler for one replica: every worker has the same order of the epoch.
        workers: among how many its batches are shared.
        next_batch: called for each, with the samples of all batches of the epoch: which one this worker is to compute,
            and which ones it is likely to be granted next; no number, if it has none until all meet.

    Raises:
        ValueError: if there are fewer batches than workers.
    """

    def __init__(self, loader: DataLoader[Any], workers: int, next_batch: NextBatch) -> None:
        self.loader, self._workers, self._next_batch = loader, workers, next_batch
        problem = too_few(loader, workers)
        if problem is not None:
            raise ValueError(
                f"{problem}: make batches smaller "
                f"(batch_size={loader.batch_size} now), or write devices={max(1, self.batches)}"
            )

    @property
    def batches(self) -> int:
        """How many an epoch has, over all workers."""
        return len(self.loader.batch_sampler)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.batches // self._workers

    def __iter__(self) -> Iterator[Any]:
        """Yield batches for as long as anybody asks: the loop knows when the epoch is over; ``None``: none is left."""
        loader, feed = self.loader, _Feed()
        inner = self._inner(feed)
        order: list[list[int]] = []
        iterator: Iterator[Any] = iter(())
        while True:
            order = order or list(loader.batch_sampler)  # type: ignore[arg-type]  # its sampler knows the epoch by now
            numbers = self._next_batch(order)
            if not numbers:
                yield None
                continue
            number, *ahead = numbers
            while feed.sent and number in list(feed.sent)[1:]:  # another worker has got the one before it
                next(iterator)
                feed.sent.popleft()
            on_its_way = bool(feed.sent) and feed.sent[0] == number
            if not on_its_way:  # then what is there is dropped
                feed.begin(order)
            feed.expect([number, *ahead])
            if not on_its_way:
                iterator = iter(inner)
            batch = next(iterator)
            feed.sent.popleft()
            yield batch

    def _inner(self, feed: _Feed) -> DataLoader[Any]:
        """Return a loader as the user's, of the batches that ``feed`` names; its processes stay while it does."""
        loader, batch_sampler = self.loader, cast(Any, feed)
        return DataLoader(
            loader.dataset,
            batch_sampler=batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.num_workers > 0,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Feed:
    """Names batches to a loader as it asks for them, and there may be more later when there is none now."""

    def __init__(self) -> None:
        self.sent: deque[int] = deque()
        """Those that the loader has been told, and has not given yet."""
        self._expected: deque[int] = deque()
        self._order: Sequence[list[int]] = ()

    def begin(self, order: Sequence[list[int]]) -> None:
        """The loader begins anew."""
        self.sent.clear()
        self._order = order

    def expect(self, numbers: Sequence[int]) -> None:
        """Let these come next, those that it has not been told yet."""
        self._expected = deque(number for number in numbers if number not in self.sent)

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> list[int]:
        if not self._expected:
            raise StopIteration
        self.sent.append(self._expected.popleft())
        return self._order[self.sent[-1]]
