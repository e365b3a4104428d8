"""What is counted of bounded staleness, from events alone."""

from __future__ import annotations

from lightning_stale.events import Joined, Pushed, Recorder, Released, Spent, ThresholdsSet, Updated
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
    again.note(Released(1.0, 1, lead=9))
    assert counts.summary()["workers"][1]["max_lead"] == 3


def test_of_another_number_of_workers_only_the_updates_go_on() -> None:
    counts = StaleSyncCounts(2, {"threshold": 3})
    for event in (Pushed(0.0, 1, staleness=2), Updated(0.0, updates=5)):
        counts.note(event)
    again = StaleSyncCounts(3, {"threshold": 3})
    again.load_state_dict(counts.state_dict())
    assert again.summary()["updates"] == 5
    assert [worker["pushes"] for worker in again.summary()["workers"]] == [0, 0, 0]
