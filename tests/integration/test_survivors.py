"""A worker that is killed in a fit: the others go on, validate everything once and train everything once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, SumMetric

from lightning_stale import Elastic, StaleSyncStrategy
from tests.integration.harness import signal_test, workers
from tests.integration.models import Ledger, numbered, trainer

SAMPLES = 96
VALIDATED = 24
"""As many for each of two ranks as of three, in batches of two."""


class Noted(Logger):
    """Notes what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        return "noted"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))


FAILED: list[str] = []
"""Outside of the model, which is as it was after a validation that is broken off."""


class Watched(Ledger):
    """Says in several ways what it has validated; ``victim`` kills itself at ``moment`` of the second validation."""

    def __init__(self, moment: str, victim: int) -> None:
        super().__init__(SAMPLES)
        self.moment, self.victim = moment, victim
        self.normalization = torch.nn.BatchNorm1d(1)  # statistics to agree on, averaged over those present
        self.sum, self.seen, self.trained = SumMetric(), CatMetric(), MeanMetric()
        self.outputs: list[int] = []
        self.validations, self.reported = 0, []
        self.modes: list[bool] = []

    def at(self, moment: str) -> None:
        kind, _, where = self.moment.rpartition(": ")
        if where != moment or self.validations != 2:
            return
        if kind in ("fails", "always fails"):
            if kind == "always fails" or not FAILED:
                FAILED.append(moment)
                raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting 30000ms for recv")
        elif self.launched == self.victim:
            os.kill(os.getpid(), signal.SIGSTOP if kind == "hangs" else signal.SIGKILL)

    def on_fit_start(self) -> None:
        self.launched = self.global_rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at("a training step")
        self.modes.append(self.training and self.normalization.training)
        self.normalization(batch[0].float().unsqueeze(1))
        self.trained.update(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.at("the end of an epoch")
        self.log("trained", self.trained.compute())
        self.trained.reset()

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations += 1
        self.at("the start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.at("a step" if batch_idx == 1 else "")
        self.sum.update(batch[0])
        self.seen.update(batch[0])
        self.outputs += batch[0].tolist()
        self.log("sum", self.sum)
        self.log("count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)
        self.log("step", float(batch_idx), on_step=True, on_epoch=False)

    def on_validation_epoch_end(self) -> None:
        self.at("its own collective")
        total = torch.tensor(sum(self.outputs))
        dist.all_reduce(total)
        self.outputs.clear()
        self.at("after its own collective")
        self.log("own", total.float())
        self.log("seen", torch.as_tensor(self.seen.compute()).sort().values.diff().sum())
        self.seen.reset()

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.reported.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})
        self.at("the end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.at("a checkpoint")


class Averaged(WeightAveraging):
    """Validates with averaged weights, whose sign tells them from those that train."""

    def __init__(self) -> None:
        super().__init__(avg_fn=lambda averaged, current, count: current.abs())
        self.signs: set[float] = set()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.signs.add(float(pl_module.pages.sum().sign()))


class Says(L.Callback):
    """Lets the test know that validations have begun."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal_test(self.folder, "validates")


def fit(rank: int, folder: str, moment: str, victim: int, paradigm: str, options: dict[str, Any]) -> dict[str, Any]:
    model, logger = Watched(moment, victim), Noted()
    elastic = Elastic(patience_s=options.pop("patience_s", 30.0))
    num_workers, average = options.pop("num_workers", 0), options.pop("average", False)
    again = options.pop("again", False)
    strategy = StaleSyncStrategy(paradigm=paradigm, elastic=elastic)
    averaged = Averaged()
    callbacks = [
        ModelCheckpoint(dirpath=folder, monitor="sum", save_top_k=-1),
        EarlyStopping("count", patience=99),
        *([averaged] if average else []),
        *([options.pop("callback")] if "callback" in options else []),
    ]
    t = trainer(
        3,
        strategy,
        **{"max_epochs": 3, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, **options},
        callbacks=callbacks,
    )
    data = DataLoader(TensorDataset(torch.arange(VALIDATED)), batch_size=2, num_workers=num_workers)
    t.fit(model, numbered(range(SAMPLES)), data)
    steps = [(row["step"], step) for row, step in logger.rows if "step" in row]
    reported, rows = list(model.reported), list(logger.rows)
    summary = strategy.summary()
    if again:
        t.fit_loop.max_epochs = 4
        t.fit(model, numbered(range(SAMPLES)), data)
    (tested,) = t.validate(model, numbered(range(VALIDATED)), verbose=False)
    return {
        "pages": model.pages.detach() / -model.lr,
        "reported": reported,
        "tested": {name: tested[name] for name in ("sum", "count")},
        "steps": steps,
        "eval rows": sum("sum" in row for row, _ in rows),
        "ranks": (t.world_size, t.global_rank, dist.get_world_size(), dist.get_rank()),
        "statistics": model.normalization.running_mean.clone(),
        "modes": set(model.modes),
        "signs": averaged.signs,
        "saved": sorted(path.name for path in Path(folder).iterdir()) if rank == 0 else [],
        "summary": summary,
        "progress": t.fit_loop.epoch_loop.val_loop.batch_progress.state_dict(),
    }


MOMENTS = [
    "the start",
    "a step",
    "its own collective",
    "after its own collective",
    "the end",
    "a training step",
    "the end of an epoch",
    "a checkpoint",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_everything_is_validated_and_trained_once(moment: str, tmp_path: Path) -> None:
    victim, paradigm = 1 + len(moment) % 2, ["asp", "bsp", "bounded-delay"][len(moment) % 3]
    ended = run(tmp_path, moment, victim, paradigm)
    check_validations(ended)
    for worker in ended:
        result = worker.result
        assert torch.equal(result["pages"], ended[0].result["pages"])
        assert result["ranks"] == (2, ended.index(worker), 2, ended.index(worker))
        assert result["tested"] == {"sum": VALIDATED * (VALIDATED - 1) / 2, "count": VALIDATED}
        assert torch.equal(result["statistics"], ended[0].result["statistics"])
        assert result["modes"] == {True}
        assert result["summary"]["leaves"] == 1
    first = ended[0].result
    if paradigm != "bsp":
        assert torch.allclose(first["pages"], torch.full((SAMPLES,), 3.0)), "each sample once in each epoch"
    assert first["eval rows"] == 3
    assert len(first["saved"]) == 3
    sizes = [4 if validation == 0 else 6 for validation in range(3)]
    if MOMENTS.index(moment) > 3:
        sizes[1] = 4
    assert [batch for batch, _ in first["steps"]] == [batch for size in sizes for batch in range(size)]


def check_validations(ended: list[Any], validations: int = 3) -> None:
    total = VALIDATED * (VALIDATED - 1) / 2
    for worker in ended:
        assert len(worker.result["reported"]) == validations
        for validation in worker.result["reported"]:
            assert (validation["sum"], validation["count"], validation["own"]) == (total, VALIDATED, total)
            assert validation["seen"] == VALIDATED - 1, "each once, in order"


def test_what_a_callback_has_swapped_for_a_validation_that_is_broken_off_is_swapped_back(tmp_path: Path) -> None:
    """And bars that are drawn, and processes that load."""
    options = {"average": True, "num_workers": 1, "enable_progress_bar": True}
    ended = run(tmp_path, "a step", 1, "asp", **options)
    check_validations(ended)
    for worker in ended:
        assert worker.result["signs"] == {1.0}, "that of the averages, in the validation that was begun anew too"
        assert torch.allclose(worker.result["pages"], torch.full((SAMPLES,), -3.0)), "fit ends with the averages"


def test_a_worker_that_hangs_in_a_validation_is_given_up(tmp_path: Path) -> None:
    options = {"patience_s": 2.0}
    folder = str(tmp_path / "saved")
    with workers(fit, 3, tmp_path, folder, "hangs: its own collective", 2, "asp", options) as group:
        for rank in (0, 1):
            group.processes[rank].join(60)
        os.kill(group.pid(2), signal.SIGKILL)
        ended = group.join(10)[:2]
    assert all(worker.exitcode == 0 for worker in ended), ended
    check_validations(ended)


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_is_killed_at_any_moment_takes_nothing_along(seed: int, tmp_path: Path) -> None:
    """Most of the time of this fit, it validates."""
    chance = random.Random(seed)
    options = {"val_check_interval": 0.25, "max_epochs": 4, "callback": Says(str(tmp_path))}
    with workers(fit, 3, tmp_path, str(tmp_path / "saved"), "", -1, "asp", options) as group:
        group.wait_for("validates")
        time.sleep(chance.uniform(0.0, 1.5))
        victim = chance.choice([1, 2])
        os.kill(group.pid(victim), signal.SIGKILL)
        left = [worker for worker in group.join(100) if worker.rank != victim]
    failed = [worker for worker in left if worker.exitcode != 0 or worker.error]
    assert not failed, "\n".join(f"rank {w.rank} (exit code {w.exitcode}):\n{w.error}" for w in failed)
    check_validations(left, validations=16)
    for worker in left:
        assert torch.allclose(worker.result["pages"], torch.full((SAMPLES,), 4.0))


def failing(rank: int, folder: str, moment: str) -> Any:
    try:
        return fit(rank, folder, moment, -1, "asp", {})
    except RuntimeError as error:
        return str(error)


def test_a_validation_that_fails_on_all_is_tried_again_and_not_for_ever(tmp_path: Path) -> None:
    """As after a suspension of the whole run, longer than a collective's timeout."""
    with workers(failing, 3, tmp_path / "once", str(tmp_path / "saved"), "fails: its own collective") as group:
        check_validations(group.join(90))
    with workers(failing, 3, tmp_path / "ever", str(tmp_path / "saved"), "always fails: its own collective") as group:
        assert all("Timed out waiting" in worker.result for worker in group.join(90))


def test_survivors_train_again(tmp_path: Path) -> None:
    ended = run(tmp_path, "a step", 1, "bounded-delay", again=True)
    check_validations(ended)
    for worker in ended:
        assert torch.allclose(worker.result["pages"], torch.full((SAMPLES,), 4.0))
        assert worker.result["ranks"] == (2, ended.index(worker), 2, ended.index(worker))


def run(tmp_path: Path, moment: str, victim: int, paradigm: str, timeout: float = 100.0, **options: Any) -> list[Any]:
    with workers(fit, 3, tmp_path, str(tmp_path / "saved"), moment, victim, paradigm, options) as group:
        ended = group.join(timeout)
    assert ended[victim].exitcode == -signal.SIGKILL, ended[victim].error
    left = [worker for worker in ended if worker.rank != victim]
    failed = [worker for worker in left if worker.exitcode != 0 or worker.error]
    assert not failed, "\n".join(f"rank {w.rank} (exit code {w.exitcode}):\n{w.error}" for w in failed)
    return left
