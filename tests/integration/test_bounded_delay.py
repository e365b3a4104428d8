"""``Trainer(strategy="bounded-delay")``: data on demand without another word, and the delay that is in force."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_stale import BoundedDelay, StaleSyncStrategy
from lightning_stale.strategies import stale_sync
from tests.integration.harness import run_workers, signal_test
from tests.integration.models import Ledger, numbered, trainer

BATCHES, WORKERS = 48, 3


class Slow(Ledger):
    """In each of its batches, rank 0 waits until the others have begun three times as many as it has."""

    def __init__(self, folder: Path) -> None:
        super().__init__(2 * BATCHES)
        self.folder, self.batches = folder, 0
        self.thresholds: dict[str, int] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches += 1
        signal_test(self.folder, f"{self.global_rank}-{self.batches}")
        if self.global_rank == 0:
            if self.batches == 1:
                self.thresholds = self.trainer.strategy.summary()["thresholds"]  # all are here, and have batches
            deadline = time.monotonic() + 60
            while self.begun() < 4 * self.batches:
                assert time.monotonic() < deadline, f"the others wait: {self.begun()} batches have been begun"
                time.sleep(0.005)
        return super().training_step(batch, batch_idx)

    def begun(self) -> int:
        return len(list(self.folder.glob("?-*")))


def fit(rank: int, strategy: Any, folder: Path) -> tuple[Tensor, int, dict[str, int], dict[str, Any]]:
    model = Slow(folder)
    t = trainer(WORKERS, strategy, max_epochs=1)
    assert isinstance(t.strategy, StaleSyncStrategy)
    before = t.strategy.summary()
    assert before["thresholds"] == t.strategy.paradigm.thresholds
    t.fit(model, numbered(range(2 * BATCHES)))
    return model.pages.detach() / -model.lr, model.batches, model.thresholds, t.strategy.summary()


@pytest.mark.parametrize(
    ("strategy", "delay"),
    [("bounded-delay", 2 * WORKERS), (StaleSyncStrategy(paradigm=BoundedDelay("auto", lower=4, upper=4)), 4)],
    ids=["by name", "auto"],
)
def test_a_slow_worker_takes_less_and_the_bound_holds(strategy: Any, delay: int, tmp_path: Path) -> None:
    results = run_workers(fit, WORKERS, tmp_path, strategy, tmp_path)
    batches = [own for _, own, _, _ in results]
    assert sum(batches) == BATCHES
    assert batches[0] <= BATCHES // 4
    assert results[0][2] == {"delay": delay}
    for pages, _, _, summary in results:
        assert torch.equal(pages, torch.ones(2 * BATCHES)), "each batch is trained once"
        assert summary["thresholds"] == {"delay": delay}, "that of all workers, who have left one by one since"
        assert [worker["pushes"] for worker in summary["workers"]] == batches
        assert max(worker["max_staleness"] for worker in summary["workers"]) <= (delay - 1) + (WORKERS - 1)


# --- shards -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(8))


def fit_shards(rank: int) -> tuple[list[str], list[str], list[int]]:
    """Return what rank 0 is told, and how many updates there were: with shards, and with what cannot be handed out."""
    notes: list[str] = []
    stale_sync.rank_zero_info = notes.append if rank == 0 else stale_sync.rank_zero_info
    ways = [("shards", numbered(range(8))), ("auto", DataLoader(Stream(), batch_size=2)), ("auto", numbered(range(8)))]
    updates = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data, loader in ways:
            strategy = StaleSyncStrategy(paradigm=BoundedDelay(4), data=data)
            trainer(2, strategy, max_epochs=1).fit(Ledger(8), loader)
            updates.append(strategy.summary()["updates"])
    return notes, [str(one.message) for one in caught if "data='shards'" in str(one.message)], updates


def test_where_nothing_is_handed_out_it_says_that_the_delay_bounds_nothing(tmp_path: Path) -> None:
    (notes, warned, updates), _ = run_workers(fit_shards, 2, tmp_path)
    assert len(warned) == 1
    assert warned[0].startswith("paradigm=BoundedDelay(delay=4) bounds how long a batch")
    assert len(notes) == 1
    assert (
        "Every worker has training data of its own, so that BoundedDelay(delay=4) bounds nothing: the training data is "
        in notes[0]
    )
    assert updates == [4, 8, 4], "each worker has all of a stream"
