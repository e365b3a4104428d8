"""What StalenessMonitor has logged, printed and written after real runs: the numbers of ``strategy.summary()``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_stale import DSPStrategy, HPSGDStrategy, StalenessMonitor, StaleSyncStrategy
from tests.integration.harness import run_workers
from tests.integration.models import Regression, loader, trainer

EPOCHS, BATCHES = 2, 6  # of each worker, and epoch
STRATEGIES: dict[str, Any] = {
    "dssp": lambda: StaleSyncStrategy(paradigm="dssp"),
    "bounded-delay": lambda: StaleSyncStrategy(paradigm="bounded-delay"),
    "hpsgd": lambda: HPSGDStrategy(interval=2),
    "dsp": lambda: DSPStrategy(staleness="dsp"),
}


class AtEpochEnd(Callback):
    """Keeps what is known then; the end of ``fit`` is one more meeting, with an exchange of its own."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.summary = trainer.strategy.summary()


def fit_all(rank: int, folder: Path) -> dict[str, Any]:
    """One strategy after the other in the same processes."""
    summaries = {}
    for name, make in STRATEGIES.items():
        logger = CSVLogger(folder / "logs", name=name, version=0)
        options = {"logger": logger, "log_every_n_steps": 2, "max_epochs": EPOCHS, "default_root_dir": folder}
        seen = AtEpochEnd()
        t = trainer(2, make(), callbacks=[StalenessMonitor(), seen], **options)
        replicas = 1 if name == "dsp" else 2
        t.fit(Regression(), loader(samples=8 * BATCHES * replicas), loader(samples=16))
        summaries[name] = (seen.summary if name == "hpsgd" else t.strategy.summary(), t.strategy.summary())
    return summaries


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run of them all, for every test of this module."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = run_workers(fit_all, 2, folder, folder)
    for name in first:
        assert first[name] == second[name], name
    return folder, first


def rows_of(folder: Path, name: str) -> list[dict[str, float]]:
    text = (folder / "logs" / name / "version_0" / "metrics.csv").read_text().splitlines()
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(text)]


def of_all(folder: Path, name: str) -> dict[str, float]:
    """What was logged of all together at the end of the last epoch."""
    found = [row for row in rows_of(folder, name) if any(key.startswith("staleness/all/") for key in row)]
    assert len(found) == EPOCHS
    return {key.removeprefix("staleness/all/"): value for key, value in found[-1].items() if "/all/" in key}


def of_rank_0(folder: Path, name: str) -> list[dict[str, float]]:
    rows = [
        {key: row[key] for key in row if "staleness/" in key and "/all/" not in key} for row in rows_of(folder, name)
    ]
    return [{key.removeprefix("staleness/"): value for key, value in row.items()} for row in rows if row]


@pytest.mark.parametrize("name", ["dssp", "bounded-delay"])
def test_bounded_staleness(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, summaries = runs
    (summary, _), logged = summaries[name], of_all(folder, name)
    workers = summary["workers"]
    pushed = [worker for worker in workers if worker["pushes"]]
    assert logged["updates"] == summary["updates"] == 2 * EPOCHS * BATCHES
    assert logged["lead"] == pytest.approx(sum(worker["mean_lead"] for worker in pushed) / len(pushed))
    assert logged["max_lead"] == max(worker["max_lead"] for worker in workers)
    assert logged["gradient"] == pytest.approx(sum(worker["mean_staleness"] for worker in pushed) / len(pushed))
    assert logged["max_gradient"] == max(worker["max_staleness"] for worker in workers)
    assert 0 <= logged["wait_share"] <= 1
    assert logged["samples_per_s"] > 0
    for worker in workers:
        for kind, mean in (("leads", "mean_lead"), ("staleness", "mean_staleness")):
            assert sum(worker[kind].values()) == worker["pushes"]
            total = sum(value * times for value, times in worker[kind].items())
            assert total == pytest.approx(worker[mean] * worker["pushes"])
    leases = sum(worker["leases"] for worker in workers)
    assert leases == (summary["updates"] + summary["taken_back"] if name == "bounded-delay" else 0)
    assert ("leases" in logged) == (name == "bounded-delay")
    mine = of_rank_0(folder, name)
    thresholds = {"dssp": {"lower": 3, "upper": 15}, "bounded-delay": {"delay": 4}}[name]
    assert len(mine) > 0
    assert {key: mine[0][key] for key in thresholds} == thresholds
    assert sum(row.keys() >= thresholds.keys() for row in mine) == EPOCHS
    for row in mine:
        assert row["leases"] <= 1 if name == "bounded-delay" else "leases" not in row


def test_averaging(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, summaries = runs
    (summary, _), logged = summaries["hpsgd"], of_all(folder, "hpsgd")
    workers = summary["workers"]
    assert [worker["steps"] for worker in workers] == [EPOCHS * BATCHES] * 2
    assert logged["rounds"] == summary["updates"] > 0
    assert logged["steps_per_round"] == pytest.approx(sum(worker["steps_per_round"] for worker in workers) / 2)
    assert logged["hidden"] == pytest.approx(sum(worker["hidden"] for worker in workers) / 2, abs=1e-4)
    mine = of_rank_0(folder, "hpsgd")
    assert len(mine) > 0
    assert {row["steps_per_round"] for row in mine} <= {1, 2, 3, 4}, "interval=2, and none has ended after the first"
    assert all(0 <= row["hidden"] <= 1 and 0 <= row["wait_share"] <= 1 for row in mine)


def test_a_pipeline(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, summaries = runs
    (summary, _), logged = summaries["dsp"], of_all(folder, "dsp")
    first, last = summary["stages"]
    assert summary["staleness"] == (2, 0)
    for stage, row in enumerate((first, last)):
        counted = {name: value for name, value in row.items() if name not in ("stage", "parameters")}
        assert {name: value for name, value in counted.items() if value is not None} == pytest.approx(
            {name: logged.get(f"stage{stage}/{name}") for name, value in counted.items() if value is not None}
        )
        assert 0 < row["utilisation"] <= 1
        assert row["busy_s"] > 0
    assert (first["wait_features_s"], first["features_queued"]) == (0.0, None)
    assert (last["wait_gradients_s"], last["gradients_queued"]) == (0.0, None)
    assert first["gradients_queued"] is not None
    assert last["wait_features_s"] > 0
    for row in of_rank_0(folder, "dsp"):  # which has the last stage
        assert "wait_gradients" not in row
        assert 0 <= row["wait_features"] <= 1
        assert 0 < row["utilisation"] <= 1
        assert "features_queued" in row


def test_the_file(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, summaries = runs
    for name, (_, summary) in summaries.items():
        path = folder / "logs" / name / "version_0" / "staleness.json"
        written = json.loads(path.read_text())
        assert written["summary"] == json.loads(json.dumps(summary))
        assert (written["world_size"], written["epochs"], written["steps"]) == (2, EPOCHS, EPOCHS * BATCHES)
    assert len(list(folder.rglob("*.json"))) == len(summaries), "one per run, by rank 0"
