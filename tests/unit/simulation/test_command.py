"""From a log to a sentence: what is read, what is chosen, and what the command prints."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_stale import __main__ as package
from lightning_stale.paradigms import DSSP, SSP, BoundedDelay
from lightning_stale.recording.log import EventLog
from lightning_stale.simulation import Cluster, Outcome, Setting, StepTimes, choose, draw, read_log, run, run_ddp, usual
from lightning_stale.simulation.command import main

LOG = """\
job,worker,stage,step,compute_s
A,0,0,10,1.0
A,0,1,10,1.5
A,0,0,12,2.0
A,10,0,12,4.0
A,10,0,10,3.0
A,2,0,10,5.0
A,2,0,12,6.0
A,2,0,14,7.0
B,0,0,1,9.0
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "steps.csv"
    path.write_text(LOG)
    return path


# --- step times -------------------------------------------------------------------------------------------------------


def test_a_log_is_read_in_order_with_the_slowest_stage_and_the_steps_that_all_have(log: Path) -> None:
    assert read_log(log, job="A") == StepTimes("steps.csv, A", ((1.5, 2.0), (5.0, 6.0), (3.0, 4.0)))


def test_a_log_may_be_compressed_and_of_one_job(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv.gz"
    path.write_bytes(gzip.compress(b"step,worker,s\n0,b,1\n0,a,2\n"))
    assert read_log(path, column="s") == StepTimes("steps.csv.gz", ((2.0,), (1.0,)))


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        (LOG, {}, r"holds the jobs A, B: choose one, e\.g\. --job A"),
        (LOG, {"job": "C"}, r"has no step of job 'C': it holds 'A', 'B'"),
        (LOG, {"job": "A", "column": "ms"}, r"has no column 'ms', but \['job', 'worker'"),
        ("worker,compute_s\n0,1\n", {}, r"has no column 'step'"),
        ("", {}, r"has no column 'worker', but \[\]"),
        ("worker,step,compute_s\n0,1,fast\n", {}, r"steps\.csv:2: compute_s='fast' is no number of seconds"),
        ("worker,step,compute_s\n0,1,0\n", {}, r"worker 0 has a step of 0\.0 s: write seconds above zero"),
        ("worker,step,compute_s\n0,1,nan\n", {}, r"worker 0 has a step of"),
        ("worker,step,compute_s\n0,1,1\n1,2,1\n", {}, r"there are no step times of worker 0"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused(tmp_path: Path, text: str, options: dict[str, Any], error: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        read_log(path, **options)


def test_drawn_times_have_their_median_and_stragglers() -> None:
    times = draw(3, 2.0, factors=[3.0], jitter=0.2, stragglers=0.1, straggler_factor=10.0, steps=4000)
    slow, *others = [sorted(each) for each in times.of]
    assert slow[1800] == pytest.approx(6.0, rel=0.02)
    for each in others:
        assert each[1800] == pytest.approx(2.0, rel=0.02)  # the median of the nine tenths
        assert sum(time > 8.0 for time in each) == pytest.approx(400, rel=0.15)
    assert times == draw(3, 2.0, factors=[3.0], jitter=0.2, stragglers=0.1, straggler_factor=10.0, steps=4000)
    assert times != draw(3, 2.0, factors=[3.0], jitter=0.2, stragglers=0.1, straggler_factor=10.0, steps=4000, seed=1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"workers": 0}, "workers=0, steps=200: write at least one of each"),
        ({"workers": 1, "factors": [2.0, 2.0]}, "2 factors for 1 workers"),
        ({"workers": 1, "stragglers": 1.5}, r"stragglers=1\.5: write a probability"),
        ({"workers": 1, "jitter": -0.1}, r"jitter=-0\.1: write a spread"),
        ({"workers": 1, "factors": [0.0]}, r"worker 0 has a step of 0\.0 s"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        draw(step_s=1.0, **arguments)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "paradigm", "data"),
    [
        ("ssp", SSP(), "shards"),
        ("SSP:5@on-demand", SSP(5), "on-demand"),
        ("dssp@shards", DSSP(), "shards"),
        ("dssp:1:9", DSSP(1, 9), "shards"),
        ("bounded-delay", BoundedDelay(), "on-demand"),
        ("bounded-delay:7@on-demand", BoundedDelay(7), "on-demand"),
        ("bounded-delay:auto", BoundedDelay("auto"), "on-demand"),
    ],
)
def test_settings_are_parsed(text: str, paradigm: object, data: str) -> None:
    setting = Setting.parse(text)
    assert (repr(setting.make()), setting.data, setting.name) == (repr(paradigm), data, text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("sssp", "setting 'sssp': is unknown. Write one of bsp, asp, ssp:3"),
        ("asp:3", "setting 'asp:3': is unknown"),
        ("ssp:x", "setting 'ssp:x': invalid literal"),
        ("ssp:-1", "SSP(threshold=-1): threshold counts clocks"),
        ("dssp:5:2", "lower must not exceed upper"),
        ("dssp:5", "is unknown"),
        ("bounded-delay:0", "delay counts leases"),
        ("asp@demand", "'asp@demand': after @ write shards or on-demand"),
        ("bounded-delay:4@shards", "write bounded-delay:4, without @shards"),
    ],
)
def test_a_setting_that_is_none_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        Setting.parse(text)


# --- the choice -------------------------------------------------------------------------------------------------------


def outcome(name: str, seconds: float, staleness: int) -> Outcome:
    return Outcome(name, "shards", 4, 1, 100, seconds, 0.9, 0.9, staleness=Counter({staleness: 100}))


@pytest.mark.parametrize(
    ("outcomes", "chosen", "gain"),
    [
        ([("a", 50.0, 9), ("b", 80.0, 2)], "a", 2.0),
        ([("a", 50.0, 13), ("b", 80.0, 2)], "b", 1.25),  # one update too stale
        ([("a", 50.0, 9), ("b", 50.9, 2)], "b", 100 / 50.9),  # as fast, and less stale
        ([("a", 50.0, 9), ("b", 52.0, 2)], "a", 2.0),
        ([("a", 96.0, 2)], "ddp", 1.0),
        ([("a", 50.0, 13)], "ddp", 1.0),
        ([], "ddp", 1.0),
    ],
)
def test_the_fastest_within_the_bound_is_chosen(
    outcomes: list[tuple[str, float, int]], chosen: str, gain: float
) -> None:
    ddp = outcome("ddp", 100.0, 0)
    choice = choose(ddp, [outcome(*each) for each in outcomes], max_staleness=12)
    assert (choice.outcome.name, choice.gain) == (chosen, pytest.approx(gain))
    assert choice.sentence.startswith(f"Choose {chosen}:")
    if chosen == "ddp":
        assert "is 5 % faster" in choice.sentence
    else:
        assert f"ddp is better if that staleness costs more than {gain:.2f} times the samples" in choice.sentence
    if outcomes and outcomes[0][2] > 12 and chosen == "ddp":
        assert "; a would be 2.00 times as fast, with 13 updates." in choice.sentence


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns_and_says_what_was_simulated(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--log", str(log), "--job", "A", "--steps", "100", "--exchange-ms", "100", "--update-ms", "50"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for setting in usual(3):
        [line] = [line for line in printed.splitlines() if line.strip(" →").startswith(f"{setting.name} ")]
        assert len(line.split()) >= 9
    assert printed.count("→") == 1
    assert "steps.csv, A: 3 workers" in printed
    assert "\nChoose " in printed


def test_long_names_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["dssp:100:2000@on-demand", "bounded-delay:20000"]
    named = [word for setting in settings for word in ("--setting", setting)]
    assert main(["--workers", "4", "--steps", "20", "--step-ms", "900000", *named]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_json_holds_the_figures_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workers", "4", "--step-ms", "20", "--slow", "2.3", "--jitter", "0.1", "--seed", "5"]
    assert main([*arguments, "--steps", "80", "--setting", "asp", "--setting", "bounded-delay:8", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    times = draw(4, 0.02, factors=[2.3], jitter=0.1, steps=80, seed=5)
    runs = [run(Setting.parse(name), times, steps=80, seed=5) for name in ("asp", "bounded-delay:8")]
    ddp = run_ddp(times, steps=80, seed=5)
    assert given["rows"] == [each.row() for each in (ddp, *runs)]
    choice = choose(ddp, runs, 12)
    assert given["choice"] == {"setting": choice.outcome.name, "gain": choice.gain, "sentence": choice.sentence}
    assert given["cluster"]["link_gbit"] is None


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_figure_is_drawn(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure{suffix}"
    assert main(["--workers", "3", "--steps", "20", "--setting", "asp", "--figure", str(path)]) == 0
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "write --log FILE for the step times of a log, or --workers N"),
        (["--workers", "2", "--log", "x.csv"], "write --log FILE"),
        (["--log", "nowhere.csv"], "nowhere.csv"),
        (["--workers", "2", "--steps", "0"], "--steps 0 --epochs 1: write at least one of each"),
        (["--workers", "2", "--setting", "sssp"], "setting 'sssp': is unknown"),
        (["--workers", "2", "--update-ms", "-1"], "Cluster(update_s=-0.001)"),
        (["--workers", "2", "--steps", "5", "--figure", "x.unknown"], "unknown"),
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
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert error in captured.err
    assert captured.err.startswith("simulate: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "printed"),
    [
        (["simulate", "--workers", "2", "--steps", "5"], 0, "Choose "),
        (["simulate", "--workers", "2", "--steps", "0"], 2, "write at least one of each"),
        (["--help"], 0, "{run,replay,simulate,join}"),
        (["simulat"], 2, "invalid choice: 'simulat'"),
        ([], 2, "the following arguments are required: command"),
    ],
)
def test_the_package_hands_on_what_is_asked_for(
    words: list[str], status: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning_stale", *words])
    with pytest.raises(SystemExit) as ended:
        package.main()
    assert ended.value.code == status
    captured = capsys.readouterr()
    assert printed in captured.out + captured.err


def test_the_record_of_a_run_is_a_log_with_the_cost_of_its_exchanges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, times = tmp_path / "run.record", draw(workers=3, step_s=0.1, factors=[2.0], jitter=0.1)
    log = EventLog(path, {})
    run(Setting.parse("ssp:2"), times, Cluster(exchange_s=0.03), steps=60, record=log.note)
    log.close()
    assert main(["--log", str(path), "--json", "--steps", "50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"]["workers"] == 3
    assert found["cluster"]["exchange_s"] == pytest.approx(0.03, rel=0.05)
    assert main(["--log", str(path), "--exchange-ms", "70", "--json", "--steps", "50"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"]["exchange_s"] == 0.07  # what is said counts
    assert main(["--log", str(path), str(path)]) == 2
    assert "it is the record of a whole run: name no other file" in capsys.readouterr().err
