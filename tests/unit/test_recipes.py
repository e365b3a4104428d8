"""What the recipes keep of a run, and how they compare runs."""

from __future__ import annotations

import doctest
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from recipes import schedules, traces
from recipes.compare import load_runs, make_table
from recipes.provenance import git_state
from recipes.train import objective

WORKER = {"rank": 0, "pushes": 8, "mean_lead": 1.0, "max_lead": 3, "mean_staleness": 2.0, "max_staleness": 4}


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, timeout=30)


def test_git_state(tmp_path: Path) -> None:
    state, diff = git_state(tmp_path)
    assert "not a git repository" in state["error"]
    assert diff == ""
    git(tmp_path, "init", "-b", "work")
    (tmp_path / "file").write_text("before\n")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    state, diff = git_state(tmp_path)
    assert (len(state["commit"]), state["branch"], state["dirty"], diff) == (40, "work", False, "")
    (tmp_path / "file").write_text("after\n")
    (tmp_path / "new").touch()
    state, diff = git_state(tmp_path)
    assert (state["dirty"], state["changed"]) == (True, [" M file", "?? new"])
    assert "-before\n+after" in diff


@pytest.mark.parametrize("module", [schedules, traces])
def test_examples(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert (found.attempted > 0, found.failed) == (True, 0)


def test_the_objective_is_a_metric() -> None:
    assert objective("val_accuracy", {"val_accuracy": 0.5}) == 0.5
    with pytest.raises(ValueError, match="objective=val_acuracy was not logged: write one of train_loss, val_accuracy"):
        objective("val_acuracy", {"val_accuracy": 0.5, "train_loss": 1.0})


def a_run(folder: Path, overrides: list[str], results: dict | None) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "curve.json").write_text("[[1.0, 500, 0.5], [2.5, 1000, 0.75]]")


def test_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    summary = {"workers": [WORKER | {"wait_s": 1.0, "compute_s": 3.0}]}
    metrics = {"val_accuracy": 0.75, "test_accuracy": 0.5}
    shared = ["experiment=digits"]
    a_run(tmp_path / "0", [*shared, "trainer/strategy=ssp", "seed=1"], {"metrics": metrics, "summary": summary})
    a_run(tmp_path / "1", [*shared, "trainer/strategy=ddp", "seed=1"], {"metrics": metrics, "summary": None})
    a_run(tmp_path / "10", [*shared, "trainer/strategy=ssp", "seed=2"], None)
    runs = load_runs(tmp_path)
    assert list(runs) == ["ssp, seed=1", "ddp, seed=1", "ssp, seed=2"]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(make_table(runs))
    rows = [line.split() for line in captured.get().splitlines() if "seed" in line]
    assert rows[0] == ["ssp,", "seed=1", "2.5", "s", "25%", "1.0", "(3)", "2.0", "75.0%", "50.0%"]
    assert rows[1] == ["ddp,", "seed=1", "2.5", "s", "75.0%", "50.0%"]
    assert rows[2] == ["ssp,", "seed=2", "failed"]


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no runs: name the folder of a multirun"):
        load_runs(tmp_path)
