"""Apply rules in real runs: against the papers' loops in a given order of pushes, alone, and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_stale import (
    ApplyRule,
    Dana,
    DelayCompensated,
    Ringmaster,
    Scaled,
    StalenessMonitor,
    StalePush,
    StaleSyncStrategy,
    Step,
)
from tests.integration.harness import run_workers, signal_test, wait_for_file
from tests.integration.models import Regression, assert_equal, assert_same, loader, numbered, trainer, weights
from tests.unit.apply import reference
from tests.unit.apply.cases import tensors, vector
from tests.unit.apply.reference import LR, ORDER, START, WORKERS, gradient, play, used


class Given(L.LightningModule):
    """The function of the reference: its gradient, at the weights of now, for this worker and turn."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self.worker, self.turn = worker, -1
        self.first, self.second = (nn.Parameter(value) for value in tensors(START))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.turn = [turn for turn, worker in enumerate(ORDER) if worker == self.worker][batch_idx]
        both = [self.first, self.second]
        given = tensors(gradient(vector(both), self.worker))
        return sum(
            (parameter * g).sum() for parameter, g, there in zip(both, given, used(self.turn), strict=True) if there
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


class InTurn(L.Callback):
    """Has the workers push in the order of the reference; notes what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, int, bool, Any, Any]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if pl_module.turn > 0:
            wait_for_file(self.folder / f"turn-{pl_module.turn - 1}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        signal_test(self.folder, f"turn-{pl_module.turn}")
        release = trainer.strategy.last_release
        logged = trainer.callback_metrics.get("staleness/refused")
        held = vector([pl_module.first, pl_module.second])
        self.seen.append((pl_module.turn, release.staleness, release.applied, logged, held))


def a_users_rule() -> ApplyRule:
    """Of a class that no other process can import, as one in a script."""

    class EveryOther(ApplyRule):
        needs_weights_then = True

        def __init__(self) -> None:
            self.pushes = 0

        def step(self, push: StalePush) -> Step | None:
            self.pushes += 1
            moved = [now - then for now, then in zip(push.weights, push.weights_then, strict=True)]
            return Step([g + 0.25 * m for g, m in zip(push.gradients, moved, strict=True)]) if self.pushes % 2 else None

    return EveryOther()


def every_other() -> reference.Master:
    pushes = [0]

    def master(now: Any, then: Any, g: Any, tau: int, worker: int, there: Any) -> Any:
        pushes[0] += 1
        return now - LR * (g + 0.25 * (now - then) * there) if pushes[0] % 2 else None

    return master


RUNS = {
    "ringmaster": ("tcp", lambda: Ringmaster(R=4), lambda: reference.ringmaster(4)),
    "delay-compensated": ("tcp", lambda: DelayCompensated(), lambda: reference.delay_compensated_adaptive(2.0)),
    "dana": ("shm", lambda: Dana(momentum=0.6), lambda: reference.dana(0.6)),
    "scaled": ("tcp", lambda: Scaled(), lambda: reference.scaled()),
    "a user's": ("shm", a_users_rule, every_other),
}


def fit_in_turn(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for name, (transport, make, _) in RUNS.items():
        turns = InTurn(folder / name)
        turns.folder.mkdir(exist_ok=True)
        strategy = StaleSyncStrategy(paradigm="asp", transport=transport, apply=make())
        callbacks = [StalenessMonitor(print_summary=False, save_summary=False, prog_bar=False), turns]
        options = {"callbacks": callbacks, "log_every_n_steps": 1, "use_distributed_sampler": False}
        t = trainer(WORKERS, strategy, max_epochs=1, **options)
        model = Given(rank)
        t.fit(model, numbered(range(ORDER.count(rank)), batch_size=1))
        results[name] = (turns.seen, strategy.summary(), vector([model.first, model.second]))
    return results


def test_rules_of_real_workers_are_what_the_papers_say(tmp_path: Path) -> None:
    ranks = run_workers(fit_in_turn, WORKERS, tmp_path, tmp_path)
    for name, (_, _, master) in RUNS.items():
        expected = play(master())
        for rank, results in enumerate(ranks):
            seen, summary, final = results[name]
            assert [turn for turn, *_ in seen] == [turn for turn, worker in enumerate(ORDER) if worker == rank]
            for turn, staleness, applied, logged, held in seen:
                assert (staleness, applied) == (expected.staleness[turn], expected.applied[turn]), (name, turn)
                assert logged == (not applied)
                np.testing.assert_allclose(held, expected.weights[turn], rtol=1e-12, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(final, expected.weights[-1], rtol=1e-12, atol=1e-12, err_msg=name)
            assert summary["updates"] == sum(expected.applied)
            refused = [turn for turn, applied in enumerate(expected.applied) if not applied]
            for worker, row in enumerate(summary["workers"]):
                assert row["refused"] == [ORDER[turn] for turn in refused].count(worker)
                assert row["pushes"] == ORDER.count(worker)


# --- one worker: bit for bit ------------------------------------------------------------------------------------------

MOMENTUM = {"lr": 0.05, "momentum": 0.9}
NESTEROV = {**MOMENTUM, "nesterov": True}
EPOCHS, BATCHES = 2, 10


def fit_alone(
    strategy: Any,
    hyperparameters: dict[str, Any],
    epochs: int = EPOCHS,
    save: Path | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Tensor]:
    model = Regression("SGD", **hyperparameters)
    callbacks = [] if save is None else [ModelCheckpoint(save.parent, filename=save.stem)]
    options = {"use_distributed_sampler": False, "enable_checkpointing": save is not None}  # the samples in one order
    t = trainer(1, strategy, max_epochs=epochs, callbacks=callbacks, **options)
    t.fit(model, loader(samples=8 * BATCHES), ckpt_path=ckpt_path)
    return weights(model)


def of(rule: ApplyRule, transport: Any = "shm") -> StaleSyncStrategy:
    return StaleSyncStrategy(paradigm="asp", transport=transport, apply=rule)


def fit_all_alone(rank: int, folder: Path) -> dict[str, Any]:
    rules = {"r": (Ringmaster(R=1), "shm"), "dc": (DelayCompensated(), "tcp"), "s": (Scaled(), "shm")}
    results: dict[str, Any] = {
        "plain": [fit_alone("auto", MOMENTUM), *(fit_alone(of(*rule), MOMENTUM) for rule in rules.values())],
        "nesterov": [fit_alone("auto", NESTEROV), fit_alone(of(Dana()), {"lr": 0.05})],
    }
    fit_alone(of(Dana()), {"lr": 0.05}, epochs=1, save=folder / "dana.ckpt")
    results["nesterov"].append(fit_alone(of(Dana(), "tcp"), {"lr": 0.05}, ckpt_path=folder / "dana.ckpt"))
    return results


def test_one_worker_is_the_plain_trainer_bit_for_bit_and_dana_its_nesterov(tmp_path: Path) -> None:
    (results,) = run_workers(fit_all_alone, 1, tmp_path, tmp_path)
    for name in ("plain", "nesterov"):
        expected, *others = results[name]
        for other in others:
            assert_same(expected, other)
    saved = torch.load(tmp_path / "dana.ckpt", weights_only=True)["lightning_stale"]["apply"]
    assert saved["rule"] == "Dana"
    assert_equal({name: tuple(v.shape) for name, v in saved["state"]["momenta"].items()}, SHAPES_OF_MOMENTA)


SHAPES_OF_MOMENTA = {
    f"0.0.{place}": tuple(parameter.shape) for place, parameter in enumerate(Regression().net.parameters())
}


def test_two_momenta_are_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"SGD has momentum=0.9, and apply=Dana\(momentum=0.9\) keeps a momentum per w"
    ):
        trainer(1, of(Dana()), max_epochs=1).fit(Regression("SGD", **MOMENTUM), loader())
