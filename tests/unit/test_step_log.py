"""What the callback writes is what the simulator reads."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_stale import ASP, SSP, StaleSyncStrategy, StepLog
from lightning_stale.paradigms import Paradigm
from lightning_stale.simulation import StepTimes, read_log


def log_of(rank: int, paradigm: Paradigm, times: list[tuple[float, float]], folder: Path | None, root: Path) -> StepLog:
    """Let a worker take steps that take so long."""

    class Strategy(StaleSyncStrategy):
        last_release: Any = None

    strategy = Strategy(paradigm=paradigm)
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=rank, default_root_dir=str(root))
    log = StepLog(folder)
    for _ in range(2):  # fits: the first one's file is overwritten
        log.setup(trainer, None, "fit")  # type: ignore[arg-type]
        log.on_fit_start(trainer, None)  # type: ignore[arg-type]
        strategy.last_release = None  # a batch without a push
        log.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
        for batch, (compute_s, wait_s) in enumerate(times):
            strategy.last_release = SimpleNamespace(compute_s=compute_s, wait_s=wait_s)
            log.on_train_batch_end(trainer, None, None, None, batch % 2)  # type: ignore[arg-type]
        log.on_fit_end(trainer, None)  # type: ignore[arg-type]
    return log


def test_what_is_written_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_of(0, ASP(), [(0.25, 0.01), (0.5, 0.02), (0.125, 0.03)], tmp_path / "steps", tmp_path)
    log_of(1, ASP(), [(1.0, 0.0), (2.0, 0.0)], tmp_path / "steps", tmp_path)
    paths = sorted((tmp_path / "steps").iterdir())
    assert [path.name for path in paths] == ["steps-0.csv", "steps-1.csv"]
    assert read_log(*paths) == StepTimes("steps-0.csv", ((0.25, 0.5), (1.0, 2.0)))
    command = f"python -m lightning_stale simulate --log {tmp_path}/steps/steps-*.csv --exchange-ms 20"
    assert any(command in record.getMessage() for record in caplog.records)


def test_where_workers_wait_for_each_other_a_wait_is_no_exchange(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        log_of(0, SSP(3), [(0.25, 0.01)], None, tmp_path)
    assert (tmp_path / "steps-0.csv").exists()
    assert any(record.getMessage().endswith("steps-*.csv") for record in caplog.records)


def test_a_strategy_that_does_not_measure_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(
        MisconfigurationException, match=r"SingleDeviceStrategy has none: write Trainer\(strategy='asp'\)"
    ):
        StepLog().setup(trainer, None, "fit")  # type: ignore[arg-type]
    StepLog().setup(trainer, None, "test")  # type: ignore[arg-type]
