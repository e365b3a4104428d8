"""The structure of lightning-hydra-template, whose module has a net among its hyper-parameters, with every strategy."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import hydra
import pytest
import torch

from tests.integration.harness import run_script
from tests.integration.hydra_template.digits import DigitsModule
from tests.integration.hydra_template.train import train
from tests.integration.models import assert_same, weights

STRATEGIES = ["bsp", "asp", "ssp", "dssp", "bounded-delay", "hpsgd", "dsp"]


def check_job(folder: Path) -> None:
    """Its checkpoints are those that a plain Trainer would have written."""
    found = json.loads((folder / "result.json").read_text())
    assert found["metrics"]["test/acc"] > 0.5
    assert found["metrics"]["val/acc_best"] >= found["metrics"]["val/acc"] > 0.5
    with next(folder.glob("csv/version_0/metrics.csv")).open() as file:
        assert sum(bool(row.get("val/acc")) for row in csv.DictReader(file)) == 2
    for path in (Path(found["best"]), folder / "checkpoints" / "last.ckpt"):
        checkpoint = torch.load(path, weights_only=False)
        saved, net = checkpoint["state_dict"], checkpoint["hyper_parameters"]["net"]
        assert not any(value.is_meta for value in saved.values())
        assert_same({f"net.{name}": value for name, value in weights(net).items()}, saved)
        loaded = DigitsModule.load_from_checkpoint(path, weights_only=False)
        assert_same(weights(loaded), saved)
        loaded.eval()
        assert loaded.net(torch.ones(2, 64)).shape == (2, 10), "the forward is its own again"
    names = set(saved)
    assert names == {f"net.{name}" for name in DigitsModule(**checkpoint["hyper_parameters"]).net.state_dict()}


def test_every_strategy_runs_it_and_writes_whole_checkpoints(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", f'exec {sys.executable} -m tests.integration.hydra_template.train "$@"']
    jobs = ["-m", f"+trainer/strategy={','.join(STRATEGIES)}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    jobs.append("hydra.sweep.subdir=${hydra:job.num}")
    ended = run_script("", tmp_path, *jobs, command=command, timeout=180.0, env={"COLUMNS": "80"})
    assert ended.returncode == 0, ended.output
    for number, strategy in enumerate(STRATEGIES):
        config = (tmp_path / "sweep" / str(number) / ".hydra" / "config.yaml").read_text()
        assert (f"_target_: lightning_stale.{'DSP' if strategy == 'dsp' else ''}") in config
        check_job(tmp_path / "sweep" / str(number))


@pytest.mark.parametrize("compiled", [False, True])
def test_virtual_stages_do_too(compiled: bool, tmp_path: Path) -> None:
    overrides = ["trainer=default", "+trainer/strategy=dsp", "+trainer.strategy.stages=3"]
    overrides += [f"paths.output_dir={tmp_path}", f"model.compile={str(compiled).lower()}"]
    with hydra.initialize_config_module("tests.integration.hydra_template.configs", version_base="1.3"):
        config = hydra.compose("train", overrides)
    train(config)
    if not compiled:
        check_job(tmp_path)
        return
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert all(name.startswith("net._orig_mod.model.") for name in saved), "as a plain Trainer names them"
    config.trainer.max_epochs = 3
    model = hydra.utils.instantiate(config.model)
    trainer = hydra.utils.instantiate(config.trainer, callbacks=[], logger=False, enable_checkpointing=False)
    trainer.fit(
        model,
        datamodule=hydra.utils.instantiate(config.data),
        ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
        weights_only=False,
    )
    assert trainer.current_epoch == 3
    assert list(model.state_dict()) == list(saved)
