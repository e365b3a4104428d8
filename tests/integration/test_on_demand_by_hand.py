"""Batches on demand where ``training_step`` steps its optimizers itself: each is trained once, by each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_stale import ASP, BSP, SSP, BoundedDelay, StaleSyncStrategy, StragglerInjection
from tests.integration.harness import run_workers
from tests.integration.models import Ledger, numbered, trainer

SAMPLES = 96
PARADIGMS = [ASP(), SSP(threshold=1), BoundedDelay()]


class Two(Ledger):
    """Two optimizers, each with a page per sample; both step in every batch, and the second one in the first of a
    worker twice if it is ``eager``.
    """

    def __init__(self, eager: bool = False) -> None:
        super().__init__(SAMPLES)
        self.automatic_optimization = False
        self.others = nn.Parameter(torch.zeros(SAMPLES))
        self.eager, self.batches, self.met = eager, 0, []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        first, second = self.optimizers()
        repeated = 2 if self.eager and self.batches == 1 else 1
        for optimizer, pages in ((first, self.pages), *[(second, self.others)] * repeated):
            optimizer.zero_grad()
            self.manual_backward(pages[batch[0]].sum())
            optimizer.step()

    def on_validation_start(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        counts = loop.batch_progress.current.ready, loop.total_batch_idx, loop._batches_that_stepped
        self.met.append((self.trainer.current_epoch, self.trainer.global_step, *counts, self.trainer.is_last_batch))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.weight, self.pages], lr=self.lr), torch.optim.SGD([self.others], lr=self.lr)]


def fit(rank: int, world_size: int, paradigm: Any, data: str, model: Two, **options: Any) -> dict[str, Any]:
    resumed = options.pop("ckpt_path", None)
    delays = StragglerInjection(factors={0: 3.0}, probability=0.3, slowdown=3.0, step_s=0.002, seed=3)
    strategy = StaleSyncStrategy(paradigm=paradigm, data=data)
    callbacks = [delays, *options.pop("callbacks", ())]
    t = trainer(world_size, strategy, **{"max_epochs": 2, "callbacks": callbacks, **options})
    t.fit(model, numbered(range(SAMPLES)), numbered(range(8)), ckpt_path=resumed)
    return {
        "pages": (model.pages.detach() / -model.lr, model.others.detach() / -model.lr),
        "batches": model.batches,
        "met": [*model.met, (t.global_step, t.num_training_batches)],
        "summary": strategy.summary(),
    }


EPOCHS: dict[str, dict[str, Any]] = {
    "two epochs": {},
    "validation amid the epoch": {"val_check_interval": 0.25},
    "max_steps": {"max_steps": 26, "val_check_interval": 5, "max_epochs": -1},
    "limit_train_batches": {"limit_train_batches": 7},
}


def fit_both(rank: int, paradigm: Any, options: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    results = []
    for data in ("on-demand", "shards"):
        saving = ModelCheckpoint(folder / data, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        results.append(fit(rank, 3, paradigm, data, Two(), **options, callbacks=[saving], enable_checkpointing=True))
    return results


@pytest.mark.parametrize("case", EPOCHS)
def test_lightning_counts_what_it_counts_with_shards(case: str, tmp_path: Path) -> None:
    """Steps of both optimizers, checkpoints after every tenth of them, all ranks alike, with a slow rank 0."""
    paradigm = PARADIGMS[len(case) % len(PARADIGMS)]
    results = run_workers(fit_both, 3, tmp_path, paradigm, EPOCHS[case], tmp_path)
    batches = {"max_steps": 13, "limit_train_batches": 2 * 7}.get(case, 2 * 16)
    for on_demand, shards in results:
        assert on_demand["met"] == shards["met"] == results[0][0]["met"]
        assert on_demand["met"][-1][0] == 2 * batches
    assert sum(on_demand["batches"] for on_demand, _ in results) == 3 * batches
    for pages in results[0][0]["pages"]:
        if case in ("max_steps", "limit_train_batches"):
            assert pages.sum() == 2 * 3 * batches
        else:
            assert torch.equal(pages, torch.full((SAMPLES,), 2.0)), "both have stepped once with each sample per epoch"
    saved = {path.name for path in (tmp_path / "on-demand").glob("*.ckpt")}
    assert saved == {path.name for path in (tmp_path / "shards").glob("*.ckpt")} != set()
    workers = results[0][0]["summary"]["workers"]
    assert sum(worker["pushes"] for worker in workers) == 2 * 3 * batches
    assert sum(worker["refused"] for worker in workers) == 0


def fit_unequal(rank: int) -> dict[str, Any]:
    return fit(rank, 3, BoundedDelay(), "on-demand", Two(eager=rank == 1), max_steps=30, max_epochs=-1)


def test_all_end_together_where_batches_have_different_numbers_of_steps(tmp_path: Path) -> None:
    """97 steps of three workers are 32 of each: with max_steps=30, all have made 29 or 30 before the last batches."""
    results = run_workers(fit_unequal, 3, tmp_path)
    pushes = sum(worker["pushes"] for worker in results[0]["summary"]["workers"])
    assert pushes == 2 * sum(result["batches"] for result in results) + 1
    for result in results:
        assert result["met"] == results[0]["met"]
        assert result["met"][-1][0] == pushes // 3 == 30


def test_bsp_takes_the_mean_of_each_optimizer(tmp_path: Path) -> None:
    results = run_workers(fit, 3, tmp_path, 3, BSP(), "on-demand", Two())
    for pages in results[0]["pages"]:
        assert torch.allclose(pages, torch.full((SAMPLES,), 2.0 / 3), rtol=1e-6)
    assert results[0]["met"] == results[1]["met"] == results[2]["met"]


# --- gradients of several batches -------------------------------------------------------------------------------------


class EveryThird(Two):
    """Both optimizers step after three batches of this worker."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(SAMPLES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.manual_backward(self.pages[batch[0]].sum() + self.others[batch[0]].sum())
        self.kept[batch[0]] += 1
        if self.batches % 3 == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            self.kept.zero_()

    def on_validation_model_zero_grad(self) -> None:
        """Lightning would drop gradients here that no step has had."""


def fit_accumulating(rank: int, paradigm: Any, options: dict[str, Any]) -> dict[str, Any]:
    model = EveryThird()
    return {**fit(rank, 3, paradigm, "on-demand", model, **options), "kept": model.kept}


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.25}], ids=["", "validation amid the epoch"])
@pytest.mark.parametrize("paradigm", [ASP(), SSP(threshold=1), BoundedDelay(), BoundedDelay(1)], ids=repr)
def test_gradients_that_are_kept_are_in_one_push_or_in_none_yet(
    paradigm: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    results = run_workers(fit_accumulating, 3, tmp_path, paradigm, options)
    kept = sum(result["kept"] for result in results)
    for result in results:
        assert result["met"] == results[0]["met"]
        for pages in result["pages"]:
            assert torch.equal(pages + kept, torch.full((SAMPLES,), 2.0))
    assert sum(result["batches"] for result in results) == SAMPLES
    pushes = [worker["pushes"] for worker in results[0]["summary"]["workers"]]
    assert pushes == [2 * (result["batches"] // 3) for result in results]


# --- checkpoints, and schedulers --------------------------------------------------------------------------------------


def save(rank: int, folder: Path) -> None:
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    fit(rank, 3, BoundedDelay(), "on-demand", Two(), callbacks=[saving], enable_checkpointing=True)


def resume(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return fit(rank, world_size, BoundedDelay(), "on-demand", Two(), ckpt_path=folder / "step=40.ckpt")


@pytest.mark.parametrize("world_size", [3, 2])
def test_a_resumed_run_trains_exactly_the_rest(world_size: int, tmp_path: Path) -> None:
    run_workers(save, 3, tmp_path / "save", tmp_path)
    for result in run_workers(resume, world_size, tmp_path / "resume", world_size, tmp_path):
        for pages in result["pages"]:
            assert torch.equal(pages, torch.full((SAMPLES,), 2.0))
        assert result["met"][-1][0] == 40 + 2 * (36 // world_size), "12 of 48 batches were trained"


class Scheduled(Two):
    """A scheduler that ``training_step`` steps."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1.0)]


def fit_by_default(rank: int, model: Two) -> tuple[int, Tensor]:
    result = fit(rank, 2, "asp", "auto", model, max_epochs=1)
    return result["batches"], result["pages"][0]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_scheduler_that_counts_the_batches_of_its_worker_means_shards(scheduled: bool, tmp_path: Path) -> None:
    results = run_workers(fit_by_default, 2, tmp_path, Scheduled() if scheduled else Two())
    assert ([batches for batches, _ in results] == [SAMPLES // 4] * 2) == scheduled
    for _, pages in results:
        assert torch.equal(pages, torch.ones(SAMPLES))
