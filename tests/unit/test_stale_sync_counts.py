"""What is counted of bounded staleness, from events alone."""

from __future__ import annotations

import random

from lightning_stale.events import (
    Granted,
    Joined,
    Pushed,
    Recorder,
    Released,
    Spent,
    TakenBack,
    ThresholdsSet,
    Updated,
)
from lightning_stale.events.histogram import bucket, count, together, width
from lightning_stale.events.stale_sync import StaleSyncCounts, WorkerCounts


def test_nothing_yet() -> None:
    assert WorkerCounts(3).summary() == {
        "rank": 3,
        "pushes": 0,
        "refused": 0,
        "max_lead": 0,
        "mean_lead": 0.0,
        "max_staleness": 0,
        "mean_staleness": 0.0,
        "wait_s": 0.0,
        "compute_s": 0.0,
        "leases": 0,
        "taken_back": 0,
        "leads": {},
        "staleness": {},
    }


def test_means_are_over_releases_and_pushes() -> None:
    counts = StaleSyncCounts(2, {})
    recorder = Recorder(counts)
    recorder.record(Joined(0.0, 1))
    for staleness in (0, 4, 5):
        recorder.record(Spent(1.0, 1, wait_s=0.5, compute_s=1.0))
        recorder.record(Pushed(1.0, 1, staleness))
    for lead in (1, 4):  # the third still waits
        recorder.record(Released(1.0, 1, lead))
    recorder.record(Spent(2.0, 1, wait_s=1.0, compute_s=0.25))
    other, summary = counts.summary()["workers"]
    assert other == WorkerCounts(0).summary()
    assert (summary["pushes"], summary["max_staleness"], summary["mean_staleness"]) == (3, 5, 3.0)
    assert (summary["max_lead"], summary["mean_lead"]) == (4, 2.5)
    assert (summary["wait_s"], summary["compute_s"]) == (2.5, 3.25)
    assert summary["staleness"] == {0: 1, 4: 1, 5: 1}
    assert summary["leads"] == {1: 1, 4: 1}


def test_leases_are_of_who_was_granted_them() -> None:
    counts = StaleSyncCounts(2, {})
    for lease, worker in enumerate((0, 1, 1, 1)):
        counts.note(Granted(0.0, worker, lease, lease, lease + 1))
    counts.note(TakenBack(1.0, 1, 3))
    summary = counts.summary()
    assert [(worker["leases"], worker["taken_back"]) for worker in summary["workers"]] == [(1, 0), (3, 1)]
    assert summary["taken_back"] == 1


def test_a_histogram_is_exact_where_staleness_usually_is_and_stays_small() -> None:
    counts: dict[int, int] = {}
    draw = random.Random(0)
    values = [*range(64), *(draw.randrange(10**6) for _ in range(20_000))]
    for value in values:
        count(counts, value)
    assert sum(counts.values()) == len(values)
    assert all(counts[value] >= 1 for value in range(64))
    assert len(counts) < 64 + 32 * 14
    for value in values:
        start = bucket(value)
        assert start <= value < start + width(start)
        assert width(start) <= 1 + value / 32
    assert together([counts, {0: 5}])[0] == counts[0] + 5


def test_a_phase_begins_with_other_thresholds_and_has_its_own_lead() -> None:
    counts = StaleSyncCounts(1, {"threshold": 3})
    for event in (
        Released(0.0, 0, lead=3),
        Updated(0.0, updates=7),
        ThresholdsSet(1.0, {"threshold": 3}),
        ThresholdsSet(1.0, {"threshold": 1}),
        Released(2.0, 0, lead=1),
    ):
        counts.note(event)
    assert counts.summary()["updates"] == 7
    assert counts.summary()["phases"] == [
        {"thresholds": {"threshold": 3}, "since": 0, "max_lead": 3},
        {"thresholds": {"threshold": 1}, "since": 7, "max_lead": 1},
    ]


def test_state_makes_equal_counts() -> None:
    counts = StaleSyncCounts(2, {"threshold": 3})
    for event in (Pushed(0.0, 1, staleness=2), Updated(0.0, updates=1), Released(0.0, 1, lead=3)):
        counts.note(event)
    again = StaleSyncCounts(2, {"threshold": 3})
    again.load_state_dict(counts.state_dict())
    assert again.summary() == counts.summary()
    assert again.summary()["workers"][1]["leads"] == {3: 1}
    again.note(Released(1.0, 1, lead=9))
    assert counts.summary()["workers"][1]["max_lead"] == 3
    assert counts.summary()["workers"][1]["leads"] == {3: 1}


def test_a_checkpoint_without_histograms_and_leases_is_gone_on_from() -> None:
    state = StaleSyncCounts(2, {"threshold": 3}).state_dict()
    for worker in state["workers"]:
        for name in ("leads", "staleness", "leases", "taken_back"):
            del worker[name]
    state["workers"][1] |= {"pushes": 7, "total_staleness": 14}
    again = StaleSyncCounts(2, {"threshold": 3})
    again.load_state_dict(state)
    again.note(Pushed(0.0, 1, staleness=2))
    worker = again.summary()["workers"][1]
    assert (worker["pushes"], worker["mean_staleness"], worker["staleness"]) == (8, 2.0, {2: 1})


def test_a_loaded_state_is_left_as_it_is() -> None:
    counts = StaleSyncCounts(1, {})
    counts.note(Pushed(0.0, 0, staleness=2))
    state = counts.state_dict()
    again = StaleSyncCounts(1, {})
    again.load_state_dict(state)
    again.note(Pushed(0.0, 0, staleness=2))
    assert state["workers"][0]["staleness"] == {2: 1}


def test_of_another_number_of_workers_only_the_updates_go_on() -> None:
    counts = StaleSyncCounts(2, {"threshold": 3})
    for event in (Pushed(0.0, 1, staleness=2), Updated(0.0, updates=5)):
        counts.note(event)
    again = StaleSyncCounts(3, {"threshold": 3})
    again.load_state_dict(counts.state_dict())
    assert again.summary()["updates"] == 5
    assert [worker["pushes"] for worker in again.summary()["workers"]] == [0, 0, 0]
