"""What of Lightning's saving, resuming and starting of processes is reached into still does what it did."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from lightning import Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _ChildProcessObserver
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

from lightning_stale.private import of_checkpoints, of_launchers, of_lightning


def test_the_warning_that_is_silenced_is_still_raised_where_loops_are_reset() -> None:
    text = inspect.getsource(_TrainingEpochLoop.reset)
    assert "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is" in text


def test_a_checkpoint_is_made_and_resumed_through_what_is_replaced() -> None:
    assert "self._get_lightning_module_state_dict()" in inspect.getsource(_CheckpointConnector.dump_checkpoint)
    assert "trainer.strategy.optimizer_state(" in inspect.getsource(_CheckpointConnector.dump_checkpoint)
    resume = inspect.getsource(_CheckpointConnector._restore_modules_and_callbacks)
    assert "self.resume_start(" in resume
    assert "self._loaded_checkpoint = " in inspect.getsource(_CheckpointConnector.resume_start)
    assert "strategy.load_model_state_dict(" in inspect.getsource(_CheckpointConnector.restore_model)


def test_what_a_checkpoint_lacks_is_where_it_is_looked_for() -> None:
    source = inspect.getsource(logger_connector._LoggerConnector.reset_metrics)
    assert all(f"self.{name} = {{}}" in source for name in of_checkpoints._METRICS)
    callback = ModelCheckpoint()
    assert all(name in vars(callback) for name in of_checkpoints._SAVED)
    assert "dirpath" in callback.state_dict()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert vars(trainer.fit_loop.epoch_loop.val_loop)["_has_run"] is False


def test_dump_leaves_everything_as_it_was() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1)
    model = BoringModel()
    trainer.strategy.connect(model)
    trainer.strategy._lightning_module.trainer = trainer
    before = dict(vars(trainer.strategy)), dict(vars(trainer._checkpoint_connector))
    trained = {parameter.data_ptr() for parameter in model.parameters()}
    assert of_checkpoints.dump(trainer, trained)["state_dict"] == {}
    assert of_checkpoints.dump(trainer, set())["state_dict"].keys() == model.state_dict().keys()
    assert (dict(vars(trainer.strategy)), dict(vars(trainer._checkpoint_connector))) == before


def test_lightning_ends_all_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, _: killed.append(pid))
    sleeps = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    fails = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert fails.wait() == 3
    assert of_launchers.end_all_with_one([sleeps, fails])
    monkeypatch.undo()
    sleeps.kill()
    sleeps.wait()
    assert len(killed) >= 1
    assert of_launchers.script_command() == list(_basic_subprocess_cmd())
    assert "sleep_period: int = 5" in inspect.getsource(_ChildProcessObserver.__init__)
    assert of_launchers.OBSERVED_S == 5.0


def test_a_strategy_knows_its_backend() -> None:
    strategy = DDPStrategy(process_group_backend="gloo")
    assert of_lightning.choose_backend(strategy) == strategy.process_group_backend == "gloo"
