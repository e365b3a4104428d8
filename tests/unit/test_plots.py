"""What is in the figures: their bars, lines, labels and hatches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_stale.events.pipeline import OfStage
from lightning_stale.plots import Point, Span, accuracy, histograms, read_trace, timeline, waiting

RUNS = {
    "ssp": [Point(1.0, 500, 0.5), Point(2.0, 1000, 0.75)],
    "ddp": [Point(2.0, 500, 0.625)],
    "failed": [],
}
WORKERS = [
    {"rank": 0, "compute_s": 9.0, "wait_s": 1.0, "leads": {0: 6, 2: 2}, "staleness": {0: 1, 1: 7}},
    {"rank": 1, "compute_s": 5.0, "wait_s": 5.0, "leads": {1: 8}, "staleness": {3: 8}},
]
SPANS = [
    Span("worker 10", 0.0, 1.5, "compute"),
    Span("worker 9", 0.5, 1.25, "compute"),
    Span("worker 9", 1.25, 3.0, "wait"),
    Span("worker 9", 5.0, 6.0, "push"),
]


def bars(axes: Axes) -> list[tuple[float, float]]:
    """Return from where to where each horizontal bar goes."""
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]  # type: ignore[attr-defined]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- curves -----------------------------------------------------------------------------------------------------------


def test_accuracy_over_time_and_samples() -> None:
    figure = accuracy(RUNS)
    over_time, over_samples = figure.axes
    assert legend(figure) == ["ssp", "ddp"], "a run without a point is left out"
    assert over_time.lines[0].get_xydata().tolist() == [[1.0, 50.0], [2.0, 75.0]]
    assert over_samples.lines[0].get_xydata().tolist() == [[0.5, 50.0], [1.0, 75.0]]
    assert over_time.lines[1].get_xydata().tolist() == [[2.0, 62.5]]
    assert (over_time.get_xlabel(), over_time.get_ylabel()) == ("time (s)", "validation accuracy (%)")
    assert over_samples.get_xlabel() == "samples of all workers (thousands)"


def test_units_follow_the_samples() -> None:
    for samples, unit, shown in ((200, "", 200.0), (2_000, " (thousands)", 2.0), (3e6, " (millions)", 3.0)):
        axes = accuracy({"run": [Point(1.0, samples, 0.5)]}, metric="loss", scale=1.0).axes
        assert axes[1].get_xlabel() == f"samples of all workers{unit}"
        assert axes[1].lines[0].get_xydata().tolist() == [[shown, 0.5]]
        assert axes[0].get_ylabel() == "loss"


def test_no_two_runs_look_alike() -> None:
    lines = accuracy({f"run {n}": [Point(1.0, 1, 0.5)] for n in range(14)}).axes[0].lines
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 14


# --- bars -------------------------------------------------------------------------------------------------------------


def test_waiting_of_workers() -> None:
    figure = waiting({"paradigm": "SSP(threshold=3)", "workers": WORKERS})
    (axes,) = figure.axes
    assert bars(axes) == [(0, 9), (9, 10), (0, 5), (5, 10)]
    assert [text.get_text() for text in axes.texts] == ["10% waiting", "50% waiting"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 0", "worker 1"]
    assert legend(figure) == ["computing", "waiting"]
    assert axes.patches[0].get_hatch() != axes.patches[1].get_hatch(), "told apart without colours"


def test_waiting_of_stages() -> None:
    counted = OfStage(busy_s=4.0, wait_s={"features": 2.0, "gradients": 1.0}, wait_to_send_s=0.5)
    summary = {"staleness": (0,), "stages": [{"stage": 0, "parameters": 1, **counted.summary(10.0)}]}
    figure = waiting(summary)
    assert bars(figure.axes[0]) == [(0, 4), (4, 6), (6, 7), (7, 7.5), (7.5, 10)]
    assert legend(figure)[-1] == "other"
    assert figure.axes[0].texts[0].get_text() == "35% waiting"


def test_histograms_of_all_workers_also_from_json() -> None:
    summary = {"workers": WORKERS}
    for each in (summary, json.loads(json.dumps(summary))):
        leads, staleness = histograms(each).axes
        heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in leads.patches}  # type: ignore[attr-defined]
        assert heights == pytest.approx({0: 37.5, 1: 50.0, 2: 12.5})
        assert sum(bar.get_height() for bar in staleness.patches) == pytest.approx(100)  # type: ignore[attr-defined]
        assert staleness.lines[0].get_xdata()[0] == (7 + 24) / 16  # type: ignore[index]
        assert leads.get_xlabel() == "lead at the OK (clocks)"
        assert leads.get_ylabel() == "share of pushes (%)"


def test_large_values_share_bars() -> None:
    counts = dict.fromkeys(range(0, 256, 4), 1)
    axes = histograms({"workers": [{"leads": {}, "staleness": counts}]}).axes[1]
    assert len(axes.patches) == 32
    assert {bar.get_height() for bar in axes.patches} == {100 / 32}  # type: ignore[attr-defined]


# --- a second ---------------------------------------------------------------------------------------------------------


def test_a_chosen_second() -> None:
    figure = timeline(SPANS, start_s=1.0, seconds=1.0)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 9", "worker 10"]
    assert axes.get_xlim() == (1.0, 2.0)
    assert bars(axes) == [(1.0, 1.5), (1.0, 1.25), (1.25, 2.0)], "cut off where the second begins and ends"
    assert legend(figure) == ["compute", "wait"]
    compute, again, wait = axes.patches
    assert compute.get_hatch() == again.get_hatch() != wait.get_hatch()
    later = timeline(SPANS, start_s=5.0).axes[0].patches[0]
    assert later.get_hatch() not in (compute.get_hatch(), wait.get_hatch()), "a kind looks the same in every second"


EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "worker 1"}},
    {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "server"}},
    {"ph": "M", "name": "thread_name", "pid": 2, "tid": 8, "args": {"name": "apply"}},
    {"ph": "X", "name": "wait", "cat": "c", "pid": 1, "tid": 0, "ts": 2_500_000, "dur": 500_000},
    {"ph": "X", "name": "compute", "pid": 1, "tid": 0, "ts": 2_000_000.0, "dur": 500_000.0, "args": {"a": [1, {}]}},
    {"ph": "s", "name": "push", "pid": 1, "tid": 0, "ts": 2_000_000, "id": 1},
    {"ph": "X", "name": "step", "pid": 2, "tid": 8, "ts": 2_100_000, "dur": 1},
    {"ph": "X", "name": "hear", "pid": 2, "tid": 9, "ts": 2_200_000, "dur": 1},
]
READ = [
    ("worker 1", 0.0, 0.5, "compute"),
    ("server, apply", 0.1, 0.100001, "step"),
    ("server, thread 9", 0.2, 0.200001, "hear"),
    ("worker 1", 0.5, 1.0, "wait"),
]


def test_a_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    text = json.dumps(EVENTS, indent=1)
    wholes = [text, json.dumps({"displayTimeUnit": "ms", "other": {"x": [1]}, "traceEvents": EVENTS})]
    crashed = [text.rstrip("]\n"), text.rstrip("]\n") + ",\n", text.rstrip("]\n") + ',\n {"ph": "X", "na']
    for content in wholes + crashed:
        path.write_text(content)
        assert read_trace(path) == [Span(*row) for row in READ], content[-30:]
    assert read_trace(str(path)) == read_trace(EVENTS)
    path.write_text("[")
    assert read_trace(path) == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: accuracy({"ssp": []}), r"curves=\{'ssp': \[\]\}: there is no point"),
        (lambda: waiting({"paradigm": "ASP()", "workers": []}), "no worker and no stage: draw it after fit"),
        (lambda: histograms({"staleness": (2, 0), "stages": []}), "'staleness', 'stages' counts no leads.*StaleSync"),
        (lambda: timeline(SPANS, start_s=9.0), "start_s=9.0, seconds=1.0: no span is there; they are from 0 to 6 s"),
        (lambda: timeline([], start_s=9.0), "there is none at all"),
        (lambda: timeline(SPANS, seconds=0.0), "seconds=0.0: write how long"),
    ],
    ids=range(6),
)
def test_what_cannot_be_drawn_is_refused_with_the_cure(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    for content in ("", '{"a": 1}', "a,b\n[1]"):
        path = tmp_path / "trace.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"trace.json is no trace in Chrome's format"):
            read_trace(path)


def test_without_matplotlib_the_error_holds_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        waiting({"workers": WORKERS})
