"""A worker that is killed in a fit: the others go on, validate everything once and train everything once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, SumMetric

from lightning_stale import StaleSyncStrategy
from tests.integration.harness import workers
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
        if moment == self.moment and self.validations == 2 and self.launched == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)

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


def fit(rank: int, folder: str, moment: str, victim: int, paradigm: str, options: dict[str, Any]) -> dict[str, Any]:
    model, logger = Watched(moment, victim), Noted()
    strategy = StaleSyncStrategy(paradigm=paradigm, elastic=True)
    callbacks = [
        ModelCheckpoint(dirpath=folder, monitor="sum", save_top_k=-1),
        EarlyStopping("count", patience=9),
        *options.pop("callbacks", ()),
    ]
    t = trainer(
        3,
        strategy,
        **{"max_epochs": 3, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, **options},
        callbacks=callbacks,
    )
    t.fit(model, numbered(range(SAMPLES)), numbered(range(VALIDATED)))
    steps = [(row["step"], step) for row, step in logger.rows if "step" in row]
    reported = list(model.reported)
    (tested,) = t.validate(model, numbered(range(VALIDATED)), verbose=False)
    return {
        "pages": model.pages.detach() / -model.lr,
        "reported": reported,
        "tested": {name: tested[name] for name in ("sum", "count")},
        "steps": steps,
        "eval rows": sum("sum" in row for row, _ in logger.rows),
        "ranks": (t.world_size, t.global_rank, dist.get_world_size(), dist.get_rank()),
        "statistics": model.normalization.running_mean.clone(),
        "modes": set(model.modes),
        "saved": sorted(path.name for path in Path(folder).iterdir()) if rank == 0 else [],
        "summary": strategy.summary(),
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
    for worker in ended:
        result = worker.result
        assert torch.equal(result["pages"], ended[0].result["pages"])
        assert result["ranks"] == (2, ended.index(worker), 2, ended.index(worker))
        assert len(result["reported"]) == 3
        total = VALIDATED * (VALIDATED - 1) / 2
        for validation in result["reported"]:
            assert (validation["sum"], validation["count"], validation["own"]) == (total, VALIDATED, total)
            assert validation["seen"] == VALIDATED - 1, "each once, in order"
        assert result["tested"] == {"sum": total, "count": VALIDATED}
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


def run(tmp_path: Path, moment: str, victim: int, paradigm: str, timeout: float = 100.0, **options: Any) -> list[Any]:
    with workers(fit, 3, tmp_path, str(tmp_path / "saved"), moment, victim, paradigm, options) as group:
        ended = group.join(timeout)
    assert ended[victim].exitcode == -signal.SIGKILL, ended[victim].error
    left = [worker for worker in ended if worker.rank != victim]
    failed = [worker for worker in left if worker.exitcode != 0 or worker.error]
    assert not failed, "\n".join(f"rank {w.rank} (exit code {w.exitcode}):\n{w.error}" for w in failed)
    return left
