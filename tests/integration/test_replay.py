"""A replayed run is the recorded one bit for bit: weights, optimizers, logged losses, checkpoints."""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stale import DSSP, BoundedDelay, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.failures import RunFailedError
from lightning_stale.recording.log import read
from lightning_stale.recording.turns import ReplayError
from lightning_stale.recording.updates import updates
from lightning_stale.transport.introduction import ServerUnavailableError
from tests.integration.harness import run_script, run_workers
from tests.integration.models import assert_equal, regression_data, trainer, weights

WORKERS, SAMPLES, BATCH = 4, 192, 4
STEPS = SAMPLES // BATCH
DELAYS = random.SystemRandom()  # another order in every run, whatever the seed


class Noisy(L.LightningModule):
    """Draws random numbers, has buffers, and takes as long for a step as chance has it."""

    noise_from: int | None = None  # the step from which its gradients are another each time
    killed: Path | None = None  # written by the rank that dies

    def __init__(self) -> None:
        super().__init__()
        L.seed_everything(5, workers=True, verbose=False)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(DELAYS.uniform(0.0, 0.006))
        if self.killed is not None and self.global_rank == 2 and self.global_step >= 6 and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        if self.noise_from is not None and self.global_rank == 1 and self.global_step >= self.noise_from:
            loss = loss + self.net[4].bias.sum() * DELAYS.random()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(strategy: Any, folder: Path, epochs: int = 2, model: Noisy | None = None, **kwargs: Any) -> dict[str, Any]:
    """Train, and return all that is to be equal."""
    model, data = model or Noisy(), regression_data(SAMPLES)
    t = trainer(
        WORKERS,
        strategy,
        max_epochs=epochs,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, save_last=True)],
    )
    t.fit(model, DataLoader(data, batch_size=BATCH, shuffle=True), DataLoader(data, batch_size=32), **kwargs)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    optimizers = [optimizer.state_dict() for optimizer in t.optimizers] if t.is_global_zero else []
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    return {
        "weights": weights(model),
        "optimizers": optimizers,
        "rows": rows,
        "saved": [checkpoint[name] for name in ("state_dict", "optimizer_states", "global_step")],
        "steps": t.global_step,
    }


CASES: dict[str, Any] = {
    "bsp": {"paradigm": "bsp"},
    "ssp": {"paradigm": "ssp", "transport": "tcp"},
    "dssp": {"paradigm": DSSP(lower=1, upper=6), "data": "on-demand"},
    "asp": {"paradigm": "asp"},
    "bounded-delay": {"paradigm": BoundedDelay("auto")},
}


def record_and_replay(rank: int, folder: Path, cases: list[str]) -> None:
    for name in cases:
        file = folder / f"{name}.record"
        first = fit(StaleSyncStrategy(**CASES[name], record=file), folder / name)
        again = fit(
            StaleSyncStrategy(**CASES[name], replay=file, record=folder / f"{name}.again"), folder / f"{name} again"
        )
        assert_equal(first, again, name)
        if rank == 0:
            made = list(updates(read(file)[1]))
            assert len(made) == 2 * STEPS // (WORKERS if name == "bsp" else 1)
            told, told_again = (
                [event for event in read(path)[1] if type(event).__name__ != "Spent"]  # what each took is measured
                for path in (file, folder / f"{name}.again")
            )
            assert told == told_again  # who was released and granted what, at the same times


def test_a_replayed_run_is_equal_bit_for_bit(tmp_path: Path) -> None:
    run_workers(record_and_replay, WORKERS, tmp_path, tmp_path, list(CASES), timeout=150)


def record_and_replay_more(rank: int, folder: Path) -> None:
    first = fit(HPSGDStrategy(record=folder / "h.record"), folder / "hpsgd")
    assert_equal(first, fit(HPSGDStrategy(replay=folder / "h.record"), folder / "hpsgd again"), "hpsgd")
    on_demand = {"data": "on-demand", "record": folder / "d.record"}
    first = fit(HPSGDStrategy(**on_demand), folder / "on demand")
    again = fit(HPSGDStrategy(data="on-demand", replay=folder / "d.record"), folder / "on demand again")
    assert_equal(first, again, "hpsgd on demand")

    # a fit that goes on from a checkpoint; and the second fit of a strategy has a record of its own
    fit(StaleSyncStrategy(paradigm="asp"), folder / "before", epochs=1)
    saved = {"ckpt_path": str(folder / "before" / "last.ckpt"), "weights_only": False}
    strategy = StaleSyncStrategy(paradigm="asp", record=folder / "resumed.record")
    first = fit(strategy, folder / "resumed", **saved)
    again = fit(StaleSyncStrategy(paradigm="asp", replay=folder / "resumed.record"), folder / "resumed again", **saved)
    assert_equal(first, again, "resumed")
    with pytest.raises((ReplayError, ServerUnavailableError)) as caught:
        fit(StaleSyncStrategy(paradigm="asp", replay=folder / "resumed.record"), folder / "anew")
    assert f"with updates={STEPS}, and this one has updates=0" in str(caught.value)


def test_rounds_and_resumed_runs_too(tmp_path: Path) -> None:
    run_workers(record_and_replay_more, WORKERS, tmp_path, tmp_path, timeout=150)


def replay_with_noise(rank: int, folder: Path) -> str:
    fit(StaleSyncStrategy(paradigm="asp", record=folder / "a.record"), folder / "first", epochs=1)
    model = Noisy()
    model.noise_from = 5
    with pytest.raises(RunFailedError) as caught:
        fit(StaleSyncStrategy(paradigm="asp", replay=folder / "a.record"), folder / "again", epochs=1, model=model)
    return str(caught.value)


def test_the_first_push_that_differs_is_named(tmp_path: Path) -> None:
    for said in run_workers(replay_with_noise, WORKERS, tmp_path, tmp_path):
        assert "the replay differs from its record: the gradient that was pushed by rank 1 in its step" in said
        assert "first in 'net.4.bias'" in said
        assert "seed_everything(SEED, workers=True)" in said


SCRIPT = """
import sys
from pathlib import Path
import torch
from lightning_stale import Elastic, StaleSyncStrategy
from tests.integration.test_replay import Noisy, fit

mode = sys.argv[1]
model = Noisy()
if mode == "record":
    model.killed = Path("killed")
which = {"record": "e.record"} if mode == "record" else {"replay": "e.record"}
strategy = StaleSyncStrategy(paradigm="bounded-delay", elastic=Elastic(max_restarts=1), **which)
end = fit(strategy, Path(mode), epochs=6, model=model)
if strategy.is_global_zero:
    summary = strategy.summary()
    counts = [summary[name] for name in ("updates", "joins", "leaves", "taken_back")]
    torch.save((end, counts, [worker["pushes"] for worker in summary["workers"]]), f"{mode}.pt")
"""


def test_a_run_in_which_a_worker_was_killed_and_replaced_is_replayed_and_up_to_an_update(tmp_path: Path) -> None:
    for mode in ("record", "replay"):
        ended = run_script(SCRIPT, tmp_path, mode)
        assert ended.returncode == 0, ended.output
    assert "rank 2 was lost here in the run that is replayed, and is now" in ended.output
    (first, counts, pushes), (again, counts_again, pushes_again) = (
        torch.load(tmp_path / f"{mode}.pt", weights_only=False) for mode in ("record", "replay")
    )
    assert counts == counts_again
    assert counts[0] == 6 * STEPS
    assert counts[2] == 1
    assert pushes == pushes_again
    assert_equal(first, again)

    command = [sys.executable, "-m", "lightning_stale", "replay", "e.record", "--until", "17", "--"]
    ended = run_script(SCRIPT, tmp_path, "record", command=command)
    assert ended.returncode == 0, ended.output
    update = list(updates(read(tmp_path / "e.record")[1]))[16]
    (push,) = update.pushes
    assert f"  the push of {push}" in ended.output
    assert "update 17 is made, as was asked for" in ended.output
    found = torch.load(tmp_path / "e.record.update-17.pt", weights_only=False)
    (saved,) = found["pushes"]
    assert (found["update"], saved["worker"], saved["step"], saved["staleness"]) == (
        *(17, push.worker, push.step, push.staleness),
    )
    names = set(dict(Noisy().named_parameters()))
    assert set(saved["gradients"]) == set(found["weights"]) == set(found["before"]) == names
    assert not torch.equal(found["before"]["net.0.weight"], found["weights"]["net.0.weight"])
    assert (tmp_path / "e.2.record").exists()  # that of the script, which says record=: nothing is written over
