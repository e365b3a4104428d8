"""From a log of stages to a sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lightning_stale.simulation import (
    Costs,
    StageTimes,
    choose_pipeline,
    draw_stages,
    parse_pipeline,
    read_stage_log,
    run_pipeline,
    usual_pipelines,
)
from lightning_stale.simulation.command import main

LOG = """\
job,worker,stage,step,compute_s
A,0,0,2,3.0
A,0,0,10,6.0
A,0,1,10,1.5
A,0,1,2,4.5
A,0,1,11,9.0
A,1,0,2,1.0
B,0,0,2,1.0
"""
APART = "stage,step,forward_s,backward_s,update_s\n0,0,1,2,0.5\n1,0,3,4,0.25\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "stages.csv"
    path.write_text(LOG)
    return path


def test_a_third_of_a_whole_is_the_forwards(log: Path) -> None:
    times = read_stage_log(log, job="A", worker="0")
    assert times.name == "stages.csv, A, worker 0"
    assert times.forward == (pytest.approx((1.0, 2.0)), pytest.approx((1.5, 0.5)))
    assert times.backward == (pytest.approx((2.0, 4.0)), pytest.approx((3.0, 1.0)))


def test_forward_and_backward_may_be_apart_and_in_several_files(tmp_path: Path) -> None:
    header, *lines = APART.splitlines(keepends=True)
    paths = [tmp_path / f"{number}.csv.gz" for number in range(2)]
    for path, line in zip(paths, lines, strict=True):
        path.write_bytes(gzip.compress((header + line).encode()))
    times = read_stage_log(*paths)
    assert times == StageTimes("0.csv.gz", ((1.0,), (3.0,)), ((2.0,), (4.0,)), ((0.5,), (0.25,)))


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        (LOG, [], "holds several jobs, A, B: choose one, e.g. --job A"),
        (LOG, ["--job", "A"], "holds several workers, 0, 1: choose one, e.g. --worker 0"),
        (LOG, ["--job", "C"], "has no job 'C': it holds A, B"),
        (LOG, ["--job", "A", "--worker", "2"], "has no worker '2': it holds 0, 1"),
        ("stage,compute_s\n", [], "has no column 'step'"),
        ("stage,step\n0,0\n", [], "has neither forward_s and backward_s nor compute_s, but ['stage', 'step']"),
        ("stage,step,compute_s\n0,0,fast\n", [], "stages.csv:2: compute_s='fast' is no number of seconds"),
        ("stage,step,compute_s\n0,0,1\n1,1,1\n", [], "stages 0, 1 have no step in common"),
        ("stage,step,compute_s\n0,0,-1\n", [], "stage 0 has a forward of -0.3"),
        ("stage,step,compute_s\n", [], "has no line of job None and worker None"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str, options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stages.csv"
    path.write_text(text)
    assert main(["pipeline", "--log", str(path), *options]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "write --log FILE for the times of a log, or --stages K"),
        (["--stages", "4", "--log", "x.csv"], "write --log FILE"),
        (["--log", "nowhere.csv"], "nowhere.csv"),
        (["--stages", "4", "--batches", "0"], "--batches 0: write at least one"),
        (["--stages", "4", "--features-mb", "3"], "--features-mb and --link-gbit say together"),
        (["--stages", "4", "--features-mb", "3", "--link-gbit", "0"], "--link-gbit 0: write a number above 0"),
        (["--stages", "4", "--forward-ms", "1", "2"], "forward_s has 2 values for 4 stages"),
        (["--stages", "4", "--setting", "4,2,0"], "has 3 values for 4 stages"),
        (["--stages", "4", "--message-ms", "-1"], "Costs(message_s=-0.001)"),
        (["--stages", "4", "--setting", "dsp", "--max-staleness", "5"], "max_staleness=5: every setting"),
        (["--stages", "4", "--batches", "5", "--figure", "x.unknown"], "unknown"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert error in captured.err
    assert captured.err.startswith("simulate pipeline: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("stages", [4, 16])
def test_the_table_fits_80_columns(stages: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pipeline", "--stages", str(stages), "--batches", "40", "--stragglers", "0.3"]
    if stages == 16:
        arguments += [
            "--setting",
            ",".join(map(str, range(45, -1, -3))),
            "--setting",
            "1f1b:16",
            "--max-staleness",
            "45",
        ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    if stages == 4:
        for setting in usual_pipelines():
            [line] = [line for line in printed.splitlines() if line.strip(" →").startswith(f"{setting.name} ")]
            assert len(line.split()) >= 12
    assert printed.count("→") == 1
    assert "\nChoose " in printed


def test_json_holds_the_figures_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stages", "3", "--forward-ms", "10", "20", "30", "--backward-ms", "40", "--seed", "5"]
    costs = ["--message-ms", "1", "--features-mb", "2", "--link-gbit", "8", "--operation-ms", "0.5"]
    chosen = ["--setting", "dsp", "--setting", "gpipe:4"]
    assert main(["pipeline", *arguments, *costs, *chosen, "--batches", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = draw_stages(3, [0.010, 0.020, 0.030], 0.040, jitter=0.05, batches=50, seed=5)
    outcomes = [
        run_pipeline(parse_pipeline(name), times, Costs(0.001, 0.002, 0.0005), batches=50)
        for name in ("dsp", "gpipe:4")
    ]
    assert found["rows"] == [outcome.row() for outcome in outcomes]
    choice = choose_pipeline(outcomes, 4)
    expected = {"setting": choice.outcome.name, "baseline": "gpipe:4", "gain": choice.gain, "sentence": choice.sentence}
    assert found["choice"] == expected


def test_a_figure_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.svg"
    assert main(["pipeline", "--stages", "3", "--batches", "20", "--setting", "dsp", "--figure", str(path)]) == 0
    assert "the first on top" in path.read_text()
