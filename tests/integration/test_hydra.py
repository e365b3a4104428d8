"""Hydra apps: every rank of a job has its config, nothing of a job is left, and the sweep goes on when a job fails.

That no process is left, also after failures and signals, is checked by the harness on the way out of ``script``.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.integration.harness import Script, marked, run_script, script, wait_for_file
from tests.integration.models import assert_same

APP = (Path(__file__).parent / "hydra_app.py").read_text()
ALONE = {"UNDECORATED": "1"}
"""The strategies of this package need no code of ours in the app."""
PARTS = {"rank-0.json", "rank-1.json", "script.log", ".hydra", "weights.pt"}


def run_app(folder: Path, *args: str, **kwargs: Any) -> Script:
    return run_script(APP, folder, *args, **kwargs)


def assert_ranks(job: Path, devices: int = 2, **expected: Any) -> dict[str, Any]:
    """Assert that all ranks have seen the same, and the ``expected`` config; return it."""
    seen = [json.loads((job / f"rank-{rank}.json").read_text()) for rank in range(devices)]
    assert len({one.pop("pid") for one in seen}) == devices
    for one in seen:
        assert one == seen[0]
        assert one["is_enum"], "the types of the config are lost"
        assert one["config"]["doubled"] == 2, "what rank 0 has made of the config went to the others"
        assert {name: one["config"][name] for name in expected} == expected
    return seen[0]


def assert_parts(job: Path, parts: set[str] = PARTS) -> None:
    assert {path.name for path in job.iterdir()} == parts


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_over_strategies(tmp_path: Path) -> None:
    """Each job meets the environment that the one before it has left, which must not look like torchrun's."""
    strategies = ("ddp", "bsp", "spawn", "dssp", "hpsgd")
    args = ("-m", "hydra.sweep.dir=sweep", f"strategy={','.join(strategies)}", "text=a b")
    ended = run_app(tmp_path, *args, timeout=170)
    assert ended.returncode == 0, ended.output
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "output.txt", "sweep"}
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"multirun.yaml", *"01234"}
    for number, strategy in enumerate(strategies):
        job, spawned = tmp_path / "sweep" / str(number), strategy == "spawn"  # whose main process is no rank
        devices = 1 if spawned else 2
        seen = assert_ranks(job, devices, strategy=strategy, number=number, name=rf"strategy={strategy},text=a\ b")
        assert seen["overrides"] == [f"strategy={strategy}", r"text=a\ b"]
        assert seen["mode"] == "RunMode.MULTIRUN"
        assert_parts(job, PARTS - {"rank-1.json"} if spawned else PARTS)
    ddp, bsp, spawn = (torch.load(tmp_path / "sweep" / number / "weights.pt") for number in "012")
    assert_same(bsp, ddp, atol=1e-6)
    assert_same(bsp, spawn)


def test_failed_jobs_of_ddp(tmp_path: Path) -> None:
    args = ("-m", "hydra.sweep.dir=sweep", "strategy=ddp", "fault=early,raise,late,none")
    ended = run_app(tmp_path, *args, timeout=170)
    assert ended.returncode == 1, ended.output
    logs = [(tmp_path / "sweep" / number / "script.log").read_text() for number in "0123"]
    assert_texts(logs[0], "RunFailedError: rank 1 (process", "ended with exit code 1 before it came to train")
    assert_texts(logs[1], "RunFailedError: rank 1 (process", "ended with exit code 1; what it printed stands above")
    assert_texts(logs[2], "RunFailedError: rank 1 (process", "ended with exit code 1 after rank 0 had finished")
    assert "failed" not in logs[3]
    assert_texts(ended.output, "an early fault of rank 1", "a fault of rank 1", "a late fault of rank 1")
    listed = ended.output[ended.output.index("Failed jobs:") :].splitlines()
    assert [line.rpartition(": ")[2] for line in listed[1:4]] == [str(tmp_path / "sweep" / n) for n in "012"]
    assert_ranks(tmp_path / "sweep" / "3", strategy="ddp", number=3)
    assert_parts(tmp_path / "sweep" / "3")


def assert_texts(output: str, *texts: str) -> None:
    for text in texts:
        assert text in output, output


@pytest.mark.parametrize(
    ("strategy", "fault", "error", "env"),
    [
        ("ddp", "raise 0", "a fault of rank 0", {}),  # while rank 1 waits for it in a collective
        ("ssp", "kill", "rank 1 (process", ALONE),
    ],
)
def test_optuna(strategy: str, fault: str, error: str, env: dict[str, str], tmp_path: Path) -> None:
    """Each rank has the trial's parameters, the objective arrives, and a trial that fails is one."""
    sweeper = ("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=2")
    args = ("-m", "hydra.sweep.dir=sweep", f"strategy={strategy}", "lr=interval(0.01,0.1)", f"fault='{fault}'")
    ended = run_app(tmp_path, *args, "fails_in=0", *sweeper, "hydra.sweeper.max_failure_rate=1.0", env=env, timeout=120)
    assert ended.returncode == 0, ended.output
    rates = [assert_ranks(tmp_path / "sweep" / number, strategy=strategy)["config"]["lr"] for number in "01"]
    assert rates[0] != rates[1]
    results = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert results["best_value"] == results["best_params"]["lr"] == rates[1]
    assert f"Failed experiment: {error}" in ended.output


def test_joblib(tmp_path: Path) -> None:
    """Two jobs at once, each in a process of joblib's; where one of them has failed, another one runs."""
    args = ("-m", "hydra.sweep.dir=sweep", "strategy=ddp,bsp,ssp", "fault=kill", "fails_in=0")
    ended = run_app(tmp_path, *args, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", timeout=150)
    assert ended.returncode == 1, ended.output
    assert "RunFailedError: rank 1" in ended.output
    for number, strategy in enumerate(("ddp", "bsp", "ssp")):
        job = tmp_path / "sweep" / str(number)
        assert_ranks(job, number=number, strategy=strategy)
        assert (job / "weights.pt").exists() == (number != 0), ended.output


# --- single runs ------------------------------------------------------------------------------------------------------


def test_a_module_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Nothing is read from ``.hydra``, which is not saved; nothing is parsed again that needs quotes."""
    package = tmp_path / "an app" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "app.py").write_text(APP)
    starter = "import sys, os, runpy; sys.argv.pop(0); os.execv(sys.executable, [sys.executable, '-m', *sys.argv])"
    run = "hydra.run.dir='${hydra.runtime.cwd}/out put/a=b,c'"
    text = r"text='x=1, {y}: \'z\' ${oc.env:HOME}'"
    args = ("package.app", "strategy=asp", run, "hydra.job.chdir=True", "hydra.output_subdir=null", text)
    ended = run_script(starter, tmp_path / "an app", *args, env=ALONE)
    assert ended.returncode == 0, ended.output
    job = tmp_path / "an app" / "out put" / "a=b,c"
    seen = assert_ranks(job, strategy="asp", text=f"x=1, {{y}}: 'z' {os.environ['HOME']}")
    assert seen["folder"] == str(job)
    assert seen["mode"] == "RunMode.RUN"
    assert_parts(job, {"rank-0.json", "rank-1.json", "app.log", "weights.pt"})


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "number", "args", "env"),
    [
        ("ddp", signal.SIGINT, (), {}),
        ("bsp", signal.SIGTERM, (), ALONE),
        ("bsp", signal.SIGTERM, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), {}),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_a_signal_ends_the_sweep(
    strategy: str, number: signal.Signals, args: tuple[str, ...], env: dict[str, str], tmp_path: Path
) -> None:
    """A signal to the sweep's own process, and to no other one."""
    arguments = ("-m", "hydra.sweep.dir=sweep", f"strategy={strategy}", "fault=endless", "lr=0.1,0.2", *args)
    with script(APP, tmp_path, *arguments, env=env) as process:
        for rank in range(2):
            wait_for_file(tmp_path / "sweep" / "0" / f"under-way-{rank}")
        assert len(marked(process.mark)) >= 2  # type: ignore[attr-defined]
        os.kill(process.pid, number)
        process.wait(40)
    if not args:
        assert not (tmp_path / "sweep" / "1").exists()
