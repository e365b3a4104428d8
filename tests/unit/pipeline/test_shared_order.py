"""Every rank takes the order that rank 0 has drawn; here, in a group of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from lightning_stale.pipeline.alike.shared_order import SharedOrder, share_order
from lightning_stale.private import of_lightning


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if dist.is_initialized():  # left by a Trainer that ran in this process
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_shared_order_is_that_of_the_sampler() -> None:
    data = TensorDataset(torch.arange(20))
    torch.manual_seed(1)
    expected = [list(RandomSampler(data)) for _ in range(2)]
    torch.manual_seed(1)
    shared = SharedOrder(RandomSampler(data))
    assert len(shared) == 20
    assert [list(shared), list(shared)] == expected
    assert expected[0] != expected[1], "another order in every epoch"


def share(loader: DataLoader[Any]) -> Callable[[], None]:
    return share_order(loader, of_lightning.batch_sampler(loader))


def drawn(loader: DataLoader[Any]) -> list[Any]:
    torch.manual_seed(1)
    return [[tensor.tolist() for tensor in batch] for batch in loader]


class Mixed(BatchSampler):
    """Draws the batches themselves in a random order."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        return (batches[i] for i in torch.randperm(len(batches)).tolist())


DATA = TensorDataset(torch.arange(10))
RANDOM: list[dict[str, Any]] = [
    {"batch_size": 4, "shuffle": True},
    {"batch_size": None, "shuffle": True},
    {"batch_sampler": Mixed(SequentialSampler(DATA), 4, False)},
    {"batch_sampler": BatchSampler(RandomSampler(DATA), 4, True)},
]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", RANDOM)
def test_whatever_draws_at_random_is_shared_once_and_draws_as_before(options: dict[str, Any]) -> None:
    expected = drawn(DataLoader(DATA, **options))
    assert expected != drawn(DataLoader(DATA, batch_size=options.get("batch_size", 4)))
    loader = DataLoader(DATA, **options)
    before = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    undo = share(loader)
    share(loader)()  # again, as a second fit does: once is enough
    assert drawn(loader) == expected
    assert len(loader) == len(expected)
    holders = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    shared = [holder for holder in holders if isinstance(holder, SharedOrder)]
    assert len({id(holder) for holder in shared}) == 1
    assert not isinstance(shared[0].sampler, SharedOrder)
    undo()
    assert (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)) == before


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("exhausting", [False, True])
def test_the_next_epoch_draws_as_without_sharing(exhausting: bool) -> None:
    """A generator that lasts sees as many draws, whether the last batch is the end (a Trainer) or not (a for loop)."""

    def epochs(shared: bool) -> list[list[int]]:
        loader = DataLoader(DATA, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))
        if shared:
            share(loader)
        count = None if exhausting else len(loader)
        return [[int(x) for (batch,) in itertools.islice(loader, count) for x in batch] for _ in range(3)]

    assert epochs(shared=True) == epochs(shared=False)


def test_an_order_without_end_is_an_error_with_the_cure() -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    with pytest.raises(TypeError, match=r"Endless has no __len__.*define __len__.*or write an IterableDataset"):
        share(DataLoader(DATA, sampler=Endless()))


class Count(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_what_draws_nothing_is_left_alone() -> None:
    """There is no process group: a shared order would fail."""
    sequential = DataLoader(DATA, batch_size=4)
    share(sequential)
    assert len(drawn(sequential)) == 3
    single = DataLoader(DATA, batch_size=None)
    share(single)
    assert len(drawn(single)) == 10
    iterable = DataLoader(Count())
    share(iterable)
    assert list(iterable) == [0, 1, 2]
    given = DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, False))
    share(given)
    assert len(drawn(given)) == 4
