"""The parts of a Hydra job that need no training: how the app is started again, and what is restored after it."""

from __future__ import annotations

import importlib.machinery
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import OmegaConf

from lightning_stale import StaleSyncStrategy, hydra_job
from lightning_stale.failures import RunFailedError
from lightning_stale.launchers import ScriptLauncher
from lightning_stale.launchers.hydra import command, job
from lightning_stale.private import of_hydra, of_launchers, of_torch


class Color(Enum):
    RED = 1


@dataclass
class Config:
    color: Color = Color.RED
    missing: int = "???"  # type: ignore[assignment]
    choice: str = "${hydra:job.name}"


@pytest.fixture
def app() -> Iterator[Any]:
    """A Hydra job that runs now; what it is given is a copy of its config, as ``@hydra.main`` makes it."""
    ConfigStore.instance().store(name="unit", node=Config)
    with initialize(version_base="1.3", config_path=None):
        config = compose("unit", return_hydra_config=True, overrides=["hydra.job.name=unit"])
    config.hydra.runtime.output_dir = "/nowhere"
    config.hydra.runtime.cwd = "/work"
    setup_globals()
    HydraConfig.instance().set_config(config)
    yield config
    HydraConfig.instance().cfg = None
    job._current = None


def test_the_config_is_saved_with_its_types_and_logs_to_the_console(app: Any, tmp_path: Path) -> None:
    command.save_config(tmp_path / "config")
    loaded = pickle.loads((tmp_path / "config").read_bytes())
    assert loaded.color is Color.RED
    assert OmegaConf.get_type(loaded) is Config
    assert OmegaConf.is_missing(loaded, "missing")
    assert loaded.choice == "unit"
    assert list(loaded.hydra.job_logging.handlers) == ["console"]
    assert loaded.hydra.job_logging.root.handlers == ["console"]
    assert "file" in of_hydra.whole_config().hydra.job_logging.handlers


def test_classes_that_joblib_has_copied_are_saved_by_their_names(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Color", Enum("Color", {"RED": 1}))
    command.save_config(tmp_path / "config")
    assert pickle.loads((tmp_path / "config").read_bytes()).color is sys.modules[__name__].Color.RED  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("main", "script", "path", "expected"),
    [
        (None, "app.py", ["/work"], ["/work/app.py"]),
        ("package.app", "/work/package/app.py", ["/work"], ["-m", "package.app"]),
        ("joblib.externals.loky.backend.popen_loky_posix", "app.py", ["/work", "/lib"], ["/work/app.py"]),
        ("joblib.externals.loky.backend.popen_loky_posix", "/work/a/b.py", ["/", "/work"], ["-m", "a.b"]),
    ],
)
def test_how_the_app_was_started(
    main: str | None,
    script: str,
    path: list[str],
    expected: list[str],
    app: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = None if main is None else importlib.machinery.ModuleSpec(main, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(sys, "path", path)
    assert command.rank_command(Path("/tmp/config"))[-len(expected) :] == expected


def test_a_job_restores_what_it_has_found(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``MASTER_PORT`` is the user's; ``LOCAL_RANK`` of the job before would look like torchrun's."""
    monkeypatch.setenv("MASTER_PORT", "29499")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    first = job.current_job()
    assert first is not None
    assert job.current_job() is first
    os.environ |= {"MASTER_PORT": "12345", "LOCAL_RANK": "0"}
    HydraConfig.instance().set_config(app)  # the next job
    assert job.current_job() is not first
    assert os.environ["MASTER_PORT"] == "29499"
    assert "LOCAL_RANK" not in os.environ


def test_a_rank_that_fails_before_it_trains_is_named(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "rank_command", lambda _: [sys.executable, "-c", "import sys; sys.exit(3)"])
    current = job.Job()
    with pytest.raises(RunFailedError, match=r"rank 1 \(process \d+\) ended with exit code 3 before it came to train"):
        current.start(2)
    assert "ended with exit code 3" in str(current.end())


def test_a_rank_that_does_not_end_is_killed(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrives_and_hangs = (
        "import os, pathlib, time; pathlib.Path(os.environ['LIGHTNING_STALE_RANKS'], os.environ['LOCAL_RANK']).touch();"
        "time.sleep(600)"
    )
    monkeypatch.setattr(job, "rank_command", lambda _: [sys.executable, "-c", arrives_and_hangs])
    monkeypatch.setattr(job, "_FAILED_S", 0.0)
    current = job.Job()
    (process,) = current.start(2)
    current.failed = True
    assert current.end() is None  # not the rank's fault
    assert process.returncode == -9


def test_a_rank_that_has_died_leaves_no_other_one_in_a_collective(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_PATIENCE_S", 0.0)
    aborted: list[bool] = []
    monkeypatch.setattr(of_torch, "abort_collectives", lambda: aborted.append(True))
    current = job.Job()
    current._ranks = {
        rank: subprocess.Popen([sys.executable, "-c", f"import time; {body}"])
        for rank, body in ((1, "raise SystemExit(1)"), (2, "time.sleep(600)"))
    }
    current._watch()
    assert current._ranks[2].returncode == -9
    assert aborted


# --- the seams in Lightning -------------------------------------------------------------------------------------------


def test_lightnings_launch_is_replaced_for_a_while() -> None:
    calls: list[Any] = []
    undo = of_launchers.replace_launch(lambda launcher, function, **_: calls.append(launcher))
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    trainer.strategy.launcher.launch(print, trainer=trainer)  # type: ignore[union-attr]
    undo()
    assert calls == [trainer.strategy.launcher]
    assert _SubprocessScriptLauncher.launch is of_launchers.lightnings_launch


def test_our_strategies_have_a_launcher_of_their_own() -> None:
    strategy = StaleSyncStrategy(paradigm="bsp")
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy.launcher) is ScriptLauncher
    assert type(trainer.strategy.launcher).__mro__[1] is _SubprocessScriptLauncher


def test_the_environment_is_the_one_that_lightning_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    announced = []
    for announce in (of_launchers.announce, _SubprocessScriptLauncher._call_children_scripts):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
        strategy = DDPStrategy()
        Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
        strategy.cluster_environment._main_port = 12345  # type: ignore[union-attr]
        announce(strategy.launcher)  # type: ignore[arg-type]
        announced.append({name: os.environ[name] for name in names})
    assert announced[0] == announced[1]


# --- the decorator ----------------------------------------------------------------------------------------------------


def test_the_decorator_is_transparent_outside_of_hydra() -> None:
    def main(config: Any) -> Any:
        return config

    assert hydra_job(main)(3) == 3  # type: ignore[arg-type]
    assert hydra_job(main).__wrapped__ is main  # type: ignore[attr-defined]


def test_errors_come_back_from_joblibs_processes() -> None:
    error = RunFailedError("sigterm", "a text")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.kind) == (str(error), error.kind)
