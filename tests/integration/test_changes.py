"""What users and callbacks do to weights, optimizers and the loop besides training: it counts, or they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_stale import ASP, StaleSyncStrategy, StragglerInjection
from tests.integration.harness import run_workers
from tests.integration.models import Regression, assert_equal, assert_same, loader, trainer, weights

PLAIN = {"use_distributed_sampler": False, "max_epochs": 1}


class Clamping(Regression):
    """Clamps its weights after each batch, as a Wasserstein critic does, and gives one new memory on the way."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.1, 0.1)
        if batch_idx == 3:
            self.net[0].weight.data = self.net[0].weight.data.clone()


class Counting(torch.optim.SGD):
    """Keeps a count in its param groups, on which its steps depend."""

    def step(self, closure: Any = None) -> Any:
        result = None if closure is None else closure()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["k"])
        return result


class WithCounting(Regression):
    def configure_optimizers(self) -> Any:
        return Counting(self.parameters(), lr=0.1)


def tcp() -> StaleSyncStrategy:
    return StaleSyncStrategy(paradigm="ssp", transport="tcp")


def fit_and_resume(rank: int, strategy: Any, model: type[Regression], path: Path) -> tuple[Any, Any, Any]:
    strategy = tcp() if strategy == "tcp" else strategy
    first = model("SGD", lr=0.05, momentum=0.9)
    t = trainer(1, strategy, **PLAIN)
    t.fit(first, loader(), loader(samples=16))
    t.save_checkpoint(path)
    second = model("SGD", lr=0.05, momentum=0.9)
    strategy = tcp() if isinstance(strategy, StaleSyncStrategy) else strategy
    trainer(1, strategy, **{**PLAIN, "max_epochs": 2}).fit(second, loader(), ckpt_path=path)
    saved = torch.load(path, weights_only=False)
    return weights(first), weights(second), saved["optimizer_states"]


@pytest.mark.parametrize("model", [Clamping, WithCounting])
def test_changes_of_the_only_worker_count(model: type[Regression], tmp_path: Path) -> None:
    plain, *others = (
        run_workers(fit_and_resume, 1, tmp_path / strategy, strategy, model, tmp_path / f"{strategy}.ckpt")[0]
        for strategy in ("auto", "ssp", "tcp")
    )
    for stale in others:
        for left, right in zip(plain[:2], stale[:2], strict=True):
            assert_same(left, right)
        assert_equal(plain[2], stale[2])


class WithTeacher(Regression):
    """A teacher that no optimizer trains follows the model by moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = torch.nn.Linear(8, 16).requires_grad_(False)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def fit_teacher(rank: int) -> dict[str, Any]:
    model = WithTeacher()
    stragglers = StragglerInjection(step_s=0.002, probability=0.3, slowdown=4.0)
    trainer(2, StaleSyncStrategy(paradigm=ASP()), max_epochs=1, callbacks=[stragglers]).fit(model, loader())
    return weights(model)


def test_what_no_optimizer_trains_is_the_same_on_all_ranks_in_the_end(tmp_path: Path) -> None:
    first, second = run_workers(fit_teacher, 2, tmp_path)
    assert_same(first, second)


def fit_with_finder(rank: int, folder: Path) -> tuple[float, int, int]:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=20)
    model = Regression("SGD", lr=0.02)
    model.lr = 0.02
    t = trainer(2, "dssp", max_epochs=1, callbacks=[finder], default_root_dir=folder, enable_checkpointing=True)
    t.fit(model, loader())
    return model.lr, t.global_step, sum(worker["pushes"] for worker in t.strategy.summary()["workers"])


def test_the_learning_rate_finder_trains_twice_in_one_fit(tmp_path: Path) -> None:
    results = run_workers(fit_with_finder, 2, tmp_path, tmp_path)
    assert results[0] == results[1]
    assert results[0][1:] == (16, 32)


class Slow(L.Callback):
    """Rank 1 comes to the end of fit when rank 0 has long been there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            assert trainer.strategy.summary()["updates"] == 32
            (self.folder / "rank 1 was served").touch()


def end_apart(rank: int, folder: Path) -> bool:
    trainer(2, "ssp", max_epochs=1, callbacks=[Slow(folder)]).fit(Regression(), loader())
    return (folder / "rank 1 was served").exists()


def test_rank_0_keeps_the_server_until_all_have_finished(tmp_path: Path) -> None:
    """Rank 0 leaves `fit` only after the goodbye of rank 1, however late that comes."""
    assert run_workers(end_apart, 2, tmp_path, tmp_path) == [True, True]
