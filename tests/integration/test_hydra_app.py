"""Real apps: one outside of this repository with the packages as they are installed, and ``recipes/train.py``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.integration.harness import ROOT, STARTUP, Script, run_script

APP = """
import json
import hydra
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    trainer = hydra.utils.instantiate(config.trainer)
    trainer.fit(hydra.utils.instantiate(config.model))
    if trainer.is_global_zero:
        with open(config.result, "w") as file:
            json.dump(trainer.strategy.summary(), file)

if __name__ == "__main__":
    main()
"""
"""Knows nothing of lightning-stale; the Trainer is built as lightning-hydra-template builds it."""

CONFIG = """
defaults:
  - _self_
  - trainer: default
result: ???
model:
  _target_: lightning.pytorch.demos.boring_classes.BoringModel
"""

TRAINER = """
_target_: lightning.pytorch.trainer.Trainer
accelerator: cpu
devices: 2
strategy: ddp
max_steps: 6
logger: false
enable_checkpointing: false
enable_progress_bar: false
enable_model_summary: false
limit_val_batches: 0
"""


def install(folder: Path) -> Path:
    """Put into ``folder`` what the wheel puts into ``site-packages``."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The folder of an app with its own configs."""
    (tmp_path / "app" / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "app" / "conf" / "config.yaml").write_text(CONFIG)
    (tmp_path / "app" / "conf" / "trainer" / "default.yaml").write_text(TRAINER)
    return tmp_path / "app"


def test_an_app_that_does_not_know_the_package(app: Path, tmp_path: Path) -> None:
    site, result = install(tmp_path / "site"), tmp_path / "result.json"
    arguments = ["+trainer/strategy=ssp", "trainer.strategy.paradigm.threshold=5", f"result={result}"]
    ended = run_script(APP, app, *arguments, env={"PYTHONPATH": str(site)})
    assert ended.returncode == 0, ended.output
    summary = json.loads(result.read_text())
    assert summary["paradigm"] == "SSP(threshold=5)"
    assert [worker["pushes"] for worker in summary["workers"]] == [6, 6]


@pytest.mark.parametrize("first", ["import lightning\n", ""], ids=["imported first", "imported by instantiate"])
def test_an_app_can_name_a_strategy_without_an_import(first: str, app: Path, tmp_path: Path) -> None:
    code = first + APP.replace("from lightning.pytorch.demos.boring_classes import BoringModel\n", "")
    site, result = install(tmp_path / "site"), tmp_path / "result.json"
    path = f"{site}{os.pathsep}{STARTUP}"
    ended = run_script(code, app, "trainer.strategy=dssp", f"result={result}", env={"PYTHONPATH": path})
    assert ended.returncode == 0, ended.output
    summary = json.loads(result.read_text())
    assert summary["paradigm"] == "DSSP(lower=3, upper=15, enforce_upper=True)"
    assert [worker["pushes"] for worker in summary["workers"]] == [6, 6]


def test_no_app_pays_for_importing_torch(tmp_path: Path) -> None:
    """Every Hydra app of an environment loads the plugin, also one that has nothing to do with training."""
    (tmp_path / "config.yaml").write_text("a: 1")
    code = (
        "import sys\nfrom hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(tmp_path)!r}, version_base='1.3'):\n"
        "    config = compose('config', ['+trainer/strategy=dssp'])\n"
        "assert config.trainer.strategy.paradigm.upper == 15\n"
        "print(sorted({'torch', 'lightning', 'lightning_stale'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(install(tmp_path / "site"))}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr


def run_train(folder: Path, *overrides: str, program: str = "train.py") -> Script:
    """Run ``recipes/train.py`` from ``folder``."""
    command = ["/bin/sh", "-c", f'exec {sys.executable} {ROOT}/recipes/{program} "$@"']  # $0 is the harness's script
    return run_script("", folder, *overrides, command=command, env={"COLUMNS": "80"})


def test_train_from_any_folder(tmp_path: Path) -> None:
    small = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.strategy.paradigm.upper=9"]
    ended = run_train(tmp_path, "trainer/strategy=dssp", "trainer.devices=2", *small)
    assert ended.returncode == 0, ended.output
    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/*/.hydra"))
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["val_accuracy"] > 0.5
    assert results["metrics"]["test_accuracy"] > 0.5
    assert results["summary"]["paradigm"] == "DSSP(lower=3, upper=9, enforce_upper=True)"
    curve = json.loads((folder / "curve.json").read_text())
    assert curve[-1][2] == results["metrics"]["val_accuracy"]
    assert 0 < curve[0][0] < curve[1][0]
    assert [samples / curve[0][1] for _, samples, _ in curve] == [1, 2], "an epoch has as many as another"

    config = OmegaConf.load(folder / "config.yaml")
    assert (config.trainer.strategy.paradigm.upper, config.output) == (9, str(folder))
    about = json.loads((folder / "provenance.json").read_text())
    assert {"python", "torch", "lightning", "lightning-stale", "hydra-core", "cuda"} <= about["versions"].keys()
    assert "commit" in about["git"] or "error" in about["git"]
    assert "trainer.devices=2" in about["command"]
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert (folder / "csv" / "metrics.csv").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["outputs"]  # nothing elsewhere

    lines = ended.output.splitlines()
    assert any("DSSP(lower=3, upper=9, enforce_upper=True)" in line for line in lines)
    assert any("test_accuracy" in line for line in lines)
    assert max(map(len, lines)) <= 80 + len(str(folder))
    assert "Warning" not in ended.output

    compared = run_train(tmp_path / "compare", str(tmp_path / "outputs"), program="compare.py")
    assert compared.returncode == 0, compared.output
    assert "run" in compared.output
    assert (tmp_path / "outputs" / "compare.png").stat().st_size > 1000


def test_what_makes_no_sense_is_refused_before_training(tmp_path: Path) -> None:
    ended = run_train(tmp_path, "trainer/strategy=ddp", "adaptation=dssp")
    assert ended.returncode == 1
    assert "Key 'paradigm' not in 'DDPStrategy'" in ended.output
    ended = run_train(tmp_path, "+callbacks.stragglers.probability=0.5")
    assert ended.returncode == 1
    assert "callbacks.stragglers has values but no _target_" in ended.output
    assert "callbacks=[default,stragglers]" in ended.output
