"""No gradient is lost or applied twice, bounds are kept, and nothing but the gate makes a worker wait."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_stale import ASP, BSP, DSSP, SSP, StalenessMonitor, StaleSyncStrategy, StragglerInjection
from lightning_stale.paradigms import Paradigm
from tests.integration.harness import run_workers, wait_for_file
from tests.integration.models import Ledger, Regression, loader, numbered, trainer, weights

WORLD_SIZE = 4
SAMPLES = 240
PARADIGMS = [ASP(), SSP(threshold=2), DSSP(lower=1, upper=5), BSP()]


def delays() -> StragglerInjection:
    """Half of all steps take 4 ms longer, at random."""
    return StragglerInjection(probability=0.5, slowdown=3.0, step_s=0.002, seed=3)


def keep_ledger(
    rank: int, paradigm: Paradigm, transport: Any, epochs: int, own_samples: list[list[int]] | None = None
) -> dict[str, Any]:
    model = Ledger(SAMPLES)
    samples = range(SAMPLES) if own_samples is None else own_samples[rank]
    t = trainer(
        WORLD_SIZE,
        StaleSyncStrategy(paradigm=paradigm, transport=transport, data="shards"),
        max_epochs=epochs,
        callbacks=[delays()],
        use_distributed_sampler=own_samples is None,
    )
    t.fit(model, numbered(list(samples)), None if own_samples is None else numbered(range(8)))
    return {"weights": weights(model), "summary": t.strategy.summary()}


def check_ledger(results: list[dict[str, Any]], paradigm: Paradigm, pushes: list[int], pages: torch.Tensor) -> None:
    summary, start = results[0]["summary"], Ledger(SAMPLES)
    assert [worker["pushes"] for worker in summary["workers"]] == pushes
    if not paradigm.averages:
        assert summary["updates"] == sum(pushes)
    for result in results:
        weight = start.weight.detach() - start.lr * summary["updates"] * start.slope
        assert torch.equal(result["weights"]["weight"], weight)
        if not paradigm.averages:
            assert torch.equal(result["weights"]["pages"], -start.lr * pages)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("paradigm", PARADIGMS, ids=repr)
def test_every_gradient_is_applied_exactly_once(paradigm: Paradigm, transport: str, tmp_path: Path) -> None:
    results = run_workers(keep_ledger, WORLD_SIZE, tmp_path, paradigm, transport, 2)
    pushes = 2 * SAMPLES // 2 // WORLD_SIZE
    check_ledger(results, paradigm, [pushes] * WORLD_SIZE, pages=torch.full((SAMPLES,), 2.0))


@pytest.mark.parametrize("paradigm", PARADIGMS, ids=repr)
def test_with_uneven_numbers_of_batches_too(paradigm: Paradigm, tmp_path: Path) -> None:
    lengths = [16, 40, 4, 60]
    starts = [sum(lengths[:rank]) for rank in range(WORLD_SIZE)]
    own = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    results = run_workers(keep_ledger, WORLD_SIZE, tmp_path, paradigm, "auto", 2, own)
    used = torch.arange(SAMPLES) < sum(lengths)
    check_ledger(results, paradigm, lengths, pages=2.0 * used)  # two epochs of batches of two samples


def run_with_stragglers(rank: int, paradigm: Paradigm) -> dict[str, Any]:
    strategy = StaleSyncStrategy(paradigm=paradigm)
    slow = StragglerInjection(factors={1: 4.0}, probability=0.3, slowdown=4.0, step_s=0.002, seed=5)
    trainer(WORLD_SIZE, strategy, max_epochs=2, callbacks=[slow]).fit(Regression(), loader(samples=4 * 8 * 30))
    return strategy.summary()


@pytest.mark.parametrize(
    ("paradigm", "bound"), [(BSP(), 0), (SSP(threshold=0), 0), (SSP(threshold=2), 2), (DSSP(lower=1, upper=4), 4)]
)
def test_no_worker_is_released_with_a_lead_above_the_bound(paradigm: Paradigm, bound: int, tmp_path: Path) -> None:
    summary = run_workers(run_with_stragglers, WORLD_SIZE, tmp_path, paradigm)[0]
    assert [worker["pushes"] for worker in summary["workers"]] == [60] * WORLD_SIZE
    assert max(worker["max_lead"] for worker in summary["workers"]) <= bound


class Rendezvous(L.Callback):
    """The slow rank blocks before its push of batch ``blocks_in`` until the fast one has reached the point awaited."""

    def __init__(self, folder: Path, slow: int, blocks_in: int, awaits: str) -> None:
        self.folder, self.slow, self.blocks_in, self.awaits = folder, slow, blocks_in, awaits

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.slow:
            (self.folder / f"start {batch_idx}").touch()
        elif batch_idx == self.blocks_in:
            wait_for_file(self.folder / self.awaits)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.slow:
            (self.folder / f"end {batch_idx}").touch()


STEPS = 12


def meet_slow_worker(
    rank: int, paradigm: Paradigm, slow: int, folder: Path, blocks_in: int, awaits: str
) -> dict[str, Any]:
    strategy = StaleSyncStrategy(paradigm=paradigm, data="shards")
    t = trainer(
        2,
        strategy,
        max_epochs=1,
        callbacks=[
            Rendezvous(folder, slow, blocks_in, awaits),
            ModelCheckpoint(folder / "checkpoints"),
            StalenessMonitor(save_summary=False),
        ],
        logger=CSVLogger(folder / "logs"),
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    t.fit(Regression(), loader(samples=2 * 8 * STEPS), loader(samples=16))
    return strategy.summary()


@pytest.mark.parametrize("slow", [0, 1])
def test_asp_lets_a_fast_worker_finish_while_a_slow_one_stands_still(slow: int, tmp_path: Path) -> None:
    """Would hang if anything made the fast worker wait: a gate, a logger, a checkpoint, a collective."""
    summary = run_workers(meet_slow_worker, 2, tmp_path, ASP(), slow, tmp_path, 2, f"end {STEPS - 1}")[0]
    assert summary["workers"][1 - slow]["max_lead"] >= STEPS - 2  # the slow one has pushed at most twice by then
    assert [worker["pushes"] for worker in summary["workers"]] == [STEPS, STEPS]


def test_ssp_lets_a_fast_worker_run_ahead_to_the_threshold_and_no_further(tmp_path: Path) -> None:
    summary = run_workers(meet_slow_worker, 2, tmp_path, SSP(threshold=3), 0, tmp_path, 0, "start 3")[0]
    assert summary["workers"][1]["max_lead"] == 3


COLLECTIVES = [
    *("broadcast", "all_reduce", "reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all"),
    *("barrier", "monitored_barrier", "send", "recv", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("all_to_all_single", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
]


class CollectiveCounter(L.Callback):
    """Notes the collectives between the start of the first and the start of the last batch.

    The process group counts what it is asked for, whoever asks; the wrappers say who it was.
    """

    def __init__(self) -> None:
        self.count = 0
        self.names: set[str] = set()
        self._begun, self._called = 0, set[str]()
        self._undo: list[Callable[[], None]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Whichever is the last of this worker: who gets batches on demand need not have the one of the last number."""
        if not self._undo:
            self._begun = self._sequence_number()
            for name in COLLECTIVES:
                self._wrap(name)
        self.count = self._sequence_number() - self._begun
        self.names = set(self._called)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def _wrap(self, name: str) -> None:
        original = getattr(torch.distributed, name)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._called.add(name)
            return original(*args, **kwargs)

        setattr(torch.distributed, name, counted)
        self._undo.append(lambda: setattr(torch.distributed, name, original))

    @staticmethod
    def _sequence_number() -> int:
        return torch.distributed.distributed_c10d._get_default_group()._get_sequence_number_for_group()


def count_collectives(rank: int, strategies: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for strategy in strategies:
        counter = CollectiveCounter()
        monitor = [] if strategy == "ddp" else [StalenessMonitor()]
        t = trainer(
            2,
            strategy,
            max_epochs=1,
            callbacks=[counter, ModelCheckpoint(folder / strategy), *monitor],
            logger=CSVLogger(folder / "logs", name=strategy),
            log_every_n_steps=1,
            enable_checkpointing=True,
            enable_progress_bar=True,
        )
        t.fit(Regression(), loader(samples=2 * 8 * STEPS), loader(samples=16))
        found[strategy] = (counter.count, counter.names)
    return found


def test_no_collective_is_left_in_a_training_batch(tmp_path: Path) -> None:
    """Fails when a Lightning release adds one; ``ddp`` shows that the counter sees those that there are."""
    for found in run_workers(count_collectives, 2, tmp_path, ["ddp", "asp", "dssp", "bsp"], tmp_path):
        count, names = found.pop("ddp")
        assert names == {"broadcast"}  # Lightning's own, of a SIGTERM; once gone, free_batches can go too
        assert count >= 2 * (STEPS - 1)  # that one, and the gradients of each batch
        assert found == {name: (0, set()) for name in ("asp", "dssp", "bsp")}
