"""What is counted about a worker."""

from __future__ import annotations

from lightning_stale.events.summaries import WorkerStatistics


def test_nothing_yet() -> None:
    assert WorkerStatistics(3).summary() == {
        "rank": 3,
        "pushes": 0,
        "max_lead": 0,
        "mean_lead": 0.0,
        "max_staleness": 0,
        "mean_staleness": 0.0,
        "wait_s": 0.0,
        "compute_s": 0.0,
    }


def test_means_are_over_releases_and_pushes() -> None:
    statistics = WorkerStatistics(0)
    for staleness in (0, 4, 5):
        statistics.note_push(staleness, wait_s=0.5, compute_s=1.0)
    for lead in (1, 4):  # the third still waits
        statistics.note_release(lead)
    statistics.note_times(wait_s=1.0, compute_s=0.25)
    summary = statistics.summary()
    assert (summary["pushes"], summary["max_staleness"], summary["mean_staleness"]) == (3, 5, 3.0)
    assert (summary["max_lead"], summary["mean_lead"]) == (4, 2.5)
    assert (summary["wait_s"], summary["compute_s"]) == (2.5, 3.25)


def test_state_makes_an_equal_object() -> None:
    statistics = WorkerStatistics(1)
    statistics.note_push(2, 0.5, 1.0)
    statistics.note_release(3)
    again = WorkerStatistics(**statistics.state_dict())
    assert again == statistics
    again.note_release(9)
    assert statistics.max_lead == 3
