"""A timeline: what Perfetto needs of it, whatever happens to the file, and what the events say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_stale import Timeline
from lightning_stale import events as e
from lightning_stale.plots.timeline import events_of
from lightning_stale.recording.trace import SERVER, AveragingTrace, StageTrace, StaleSyncTrace
from lightning_stale.recording.trace_file import TraceFile, merge_traces


def list_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace, as a parser reads them that knows nothing of who has written it."""
    return list(events_of(path))


def check(events: list[dict[str, Any]]) -> None:
    """Assert that ``events`` are of the Chrome format: what its importers drop or misplace is not there."""
    open_arrows: dict[Any, dict[str, Any]] = {}
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        assert event["ph"] in "MXCisf", event
        assert isinstance(event["name"], str), event
        assert isinstance(event["pid"], int), event
        if event["ph"] == "M":
            assert event["args"], event
            continue
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert event["dur"] > 0, event
            rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values()), event
    for slices in rows.values():  # of one row, one is within another, or after it
        ends: list[float] = []
        for start, end in sorted(slices, key=lambda one: (one[0], -one[1])):
            while ends and ends[-1] <= start + 1.5:  # microseconds: the shortest slice is as long as that
                ends.pop()
            assert not ends or end <= ends[-1] + 1.5, (start, end, ends)
            ends.append(end)
    for event in sorted(
        (event for event in events if event["ph"] in "sf"), key=lambda one: (one["ts"], one["ph"] == "f")
    ):
        key = (event["cat"], event["id"])
        assert isinstance(event["id"], int), "Perfetto drops an arrow whose id is text"
        if event["ph"] == "s":
            assert key not in open_arrows, event
            open_arrows[key] = event
        else:
            start = open_arrows.pop(key)
            assert start["ts"] <= event["ts"] + 1.5, (start, event)
            assert event["bp"] == "e"
        inside = rows[event["pid"], event["tid"]]
        assert any(start - 1.5 <= event["ts"] <= end + 1.5 for start, end in inside), event  # what it is bound to


def test_it_can_be_read_at_any_moment_and_after_any_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path, max_events=1000)
    assert list_of(path) == []
    file.name(ph="M", name="process_name", pid=1, args={"name": "a } worker],\n[{"})
    for number in range(3):
        file.write({"ph": "i", "name": str(number), "pid": 1, "ts": float(number)})
        assert [event["name"] for event in list_of(path)] == ["process_name", *map(str, range(number + 1))]
    whole, events = path.read_bytes(), list_of(path)
    sizes = [len(b"".join(whole.splitlines(keepends=True)[: 2 + lines])) - len(b",\n") for lines in range(len(events))]
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        assert list_of(path) == events[: sum(size <= cut for size in sizes)]


def test_it_is_bounded_and_keeps_the_newest_and_all_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path, max_events=1000)
    file.name(ph="M", name="process_name", pid=7, args={"name": "stage 7"})
    for number in range(10_000):
        file.write({"ph": "i", "name": str(number), "pid": 7, "ts": float(number)})
        if number % 487 == 0:
            events = list_of(path)
            assert len(events) <= 1001
            assert events[0]["args"] == {"name": "stage 7"}
            kept = [int(event["name"]) for event in events[1:]]
            assert kept == list(range(kept[0], number + 1))
            assert len(kept) >= min(500, number + 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_timeline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_events=10: write a number >= 1000"):
        Timeline(max_events=10)


def traced(tmp_path: Path, make: Any, told: list[e.Event]) -> list[dict[str, Any]]:
    path = tmp_path / f"{make.__name__}.json"
    reader = make(TraceFile(path, 10_000))
    for event in told:
        reader.note(event)
    events = list_of(path)
    check(events)
    return events


def rows(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    found = [(event["pid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    return sorted(found, key=lambda row: row[2])


def test_workers_of_a_server(tmp_path: Path) -> None:
    told: list[e.Event] = [
        *(e.Joined(0.0, 0), e.Joined(0.0, 1)),
        *(e.Turn(0.5, 0, "sync"), e.Turn(1.0, 1, "sync"), e.Met(1.0, 0), e.Met(1.0, 1)),
        *(e.Turn(1.5, 0, "request"), e.Granted(1.6, 0, lease=0, first=3, last=5)),
        # worker 0 pushes, and waits until worker 1 has pushed
        *(e.Turn(2.0, 0, "push"), e.Spent(2.0, 0, wait_s=0.1, compute_s=0.4), e.Pushed(2.0, 0, staleness=2)),
        *(e.Turn(3.0, 1, "push"), e.Spent(3.0, 1, wait_s=0.0, compute_s=1.5), e.Pushed(3.0, 1, staleness=1)),
        *(e.Released(3.0, 1, lead=0), e.Released(3.0, 0, lead=1)),
        *(e.ThresholdsSet(3.5, {"threshold": 4}), e.TakenBack(3.6, 1, 7), e.Left(3.6, 1, lost=True)),
        e.Failed(4.0, "error", "rank 1 is gone"),
    ]
    events = traced(tmp_path, StaleSyncTrace, told)
    assert rows(events) == [
        (0, "wait for the others", 0.5e6, 0.5e6),
        (0, "wait for a batch", 1.5e6, 100_000.0),
        (1, "compute", 1.5e6, 1.5e6),
        (0, "compute", 1.6e6, 400_000.0),
        (SERVER, "push", 2e6, 1.0),
        (0, "wait for the OK", 2e6, 1e6 + 1),
        (SERVER, "push", 3e6, 1.0),
    ]
    (compute,) = (event for event in events if event["ph"] == "X" and event["name"] == "compute" and event["pid"] == 0)
    assert compute["args"] == {"batches": [3, 4]}
    counters = [(event["pid"], event["args"]) for event in events if event["ph"] == "C"]
    assert counters == [(0, {"updates": 2}), (1, {"updates": 1}), (SERVER, {"threshold": 4})]
    arrows = Counter((event["name"], event["ph"], event["pid"]) for event in events if event["ph"] in "sf")
    assert arrows == {
        **{("push", "s", 0): 1, ("push", "f", SERVER): 2, ("push", "s", 1): 1},
        **{("released by worker 1", "s", SERVER): 1, ("released by worker 1", "f", 0): 1},
    }
    assert [event["name"] for event in events if event["ph"] == "i"] == [
        *("joins", "joins", "lease 7 is taken back", "is lost", "the run fails: rank 1 is gone"),
    ]


def test_a_rank_that_averages_by_the_clock_of_the_run(tmp_path: Path) -> None:
    def make(file: TraceFile) -> AveragingTrace:
        return AveragingTrace(file, rank=3, offset_s=10.0)

    told: list[e.Event] = [
        *(e.Stepped(1.0), e.Stepped(1.5), e.Exchanged(2.0, exchange_s=0.9, wait_s=0.2), e.RoundEnded(2.0)),
        *(e.Stepped(2.5), e.Exchanged(2.5, exchange_s=0.4, wait_s=0.0)),
    ]
    assert rows(traced(tmp_path, make, told)) == [
        (3, "step", 11e6, 500_000.0),
        (3, "average", 11.1e6, 900_000.0),
        (3, "wait for the average", 11.8e6, 200_000.0),
        (3, "step", 12e6, 500_000.0),
        (3, "average", 12.1e6, 400_000.0),
    ]


def test_stages_and_what_travels_between_them(tmp_path: Path) -> None:
    """Two ranks, in two files: the arrows find their ends when these are one, also where batches are counted anew."""
    first: list[e.Event] = [
        *(e.StageRan(1.0, 0, 0, "forward", 0.5), e.Sent(1.1, 0, 0, "features", 0.1)),
        *(e.Received(2.5, 0, 0, "gradients", 1.4, 0), e.StageRan(3.0, 0, 0, "backward", 0.5), e.Elapsed(3.0, 3.0)),
        *(e.StageRan(4.0, 0, 0, "forward", 0.5), e.Sent(4.1, 0, 0, "features", 0.1)),
    ]
    last: list[e.Event] = [
        *(e.Received(1.2, 1, 0, "features", 1.2, 0), e.StageRan(2.0, 1, 0, "backward", 0.8)),
        *(e.Sent(2.1, 1, 0, "gradients", 0.1), e.Elapsed(3.0, 3.0)),
        *(e.Received(4.2, 1, 0, "features", 0.1, 1),),
    ]
    paths = []
    for rank, told in enumerate((first, last)):
        paths.append(tmp_path / f"{rank}.json")
        reader = StageTrace(TraceFile(paths[-1], 10_000))
        for event in told:
            reader.note(event)
    (tmp_path / "whole.json").write_bytes(merge_traces([path.read_bytes() for path in paths]))
    events = list_of(tmp_path / "whole.json")
    check(events)
    ends = Counter((event["name"], event["id"]) for event in events if event["ph"] in "sf")
    assert sorted((name, count) for (name, _), count in ends.items()) == [
        *(("features", 2), ("features", 2), ("gradients", 2)),
    ]
    assert [row[:2] for row in rows(events)] == [
        *((1, "wait for features"), (0, "forward"), (0, "send features"), (0, "wait for gradients")),
        *((1, "backward"), (1, "send gradients"), (0, "backward"), (0, "forward")),
        *((0, "send features"), (1, "wait for features")),
    ]
