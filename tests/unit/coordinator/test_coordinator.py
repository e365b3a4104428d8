"""The coordinator's decisions, one at a time."""

from __future__ import annotations

import pytest

from lightning_stale import events
from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.paradigms import ASP, SSP
from tests.unit.coordinator.queue_leases import QueueLeases


def started(coordinator: Coordinator, members: int) -> None:
    """Have all join and meet."""
    for rank in range(members):
        assert coordinator.handle(m.Join(rank, 100 + rank), 0.0) == [m.Joined(rank, 1)]
    for rank in range(members):
        replies = coordinator.handle(m.Arrive(rank, 1, "the start"), 0.0)
    thresholds = {} if coordinator.paradigm is None else coordinator.paradigm.thresholds
    assert replies == [m.Met(rank, thresholds) for rank in range(members)]


def test_an_ok_waits_for_the_gate() -> None:
    coordinator = Coordinator(2, SSP(0))
    started(coordinator, 2)
    assert coordinator.handle(m.Push(0, 1), 1.0) == []
    assert coordinator.handle(m.Push(1, 1), 2.0) == [m.Released(1, 1, 0), m.Released(0, 1, 0)]


def test_who_is_at_a_meeting_holds_nobody_up() -> None:
    coordinator = Coordinator(2, SSP(0))
    started(coordinator, 2)
    assert coordinator.handle(m.Push(0, 1), 1.0) == []
    assert coordinator.handle(m.Arrive(1, 1, "validation"), 2.0) == [m.Released(0, 1, 0)]


def test_different_places_end_the_run_for_all() -> None:
    coordinator = Coordinator(2)
    started(coordinator, 2)
    assert coordinator.handle(m.Arrive(0, 1, "validation", "step 4"), 1.0) == []
    replies = coordinator.handle(m.Arrive(1, 1, "the end of fit", "step 3"), 2.0)
    assert [(type(reply), reply.member) for reply in replies] == [(m.Failed, 0), (m.Failed, 1)]
    assert "rank 0 is at validation (step 4); rank 1 is at the end of fit (step 3)" in replies[0].text  # type: ignore[union-attr]


@pytest.mark.parametrize("leaves_first", [True, False])
def test_who_is_at_a_meeting_hears_that_another_has_finished(leaves_first: bool) -> None:
    coordinator = Coordinator(3)
    started(coordinator, 3)
    messages: list[m.Message] = [m.Arrive(0, 1, "a checkpoint", "step 9"), m.Leave(1, 1)]
    for message in reversed(messages) if leaves_first else messages:
        assert coordinator.handle(message, 1.0) == []
    replies = coordinator.handle(m.Arrive(2, 1, "a checkpoint", "step 9"), 2.0)
    assert [(type(reply), reply.member) for reply in replies] == [(m.Failed, 0), (m.Failed, 2)]
    assert "rank 2 is at a checkpoint (step 9); rank 1 has finished" in replies[0].text  # type: ignore[union-attr]


def test_of_several_failures_the_first_is_told() -> None:
    coordinator = Coordinator(3, ASP())
    started(coordinator, 3)
    text = "rank 1 (process 101) is gone: it was killed, has crashed or hangs"
    assert coordinator.handle(m.Lose(1, 1), 1.0) == [m.Failed(0, "error", text), m.Failed(2, "error", text)]
    assert coordinator.handle(m.Push(0, 1), 2.0) == [m.Failed(0, "error", text)]
    assert coordinator.handle(m.Abort(2, 1, "error", "raised ValueError"), 3.0) == [m.Aborted(2, text)]
    assert coordinator.handle(m.Arrive(0, 1, "validation"), 4.0) == [m.Failed(0, "error", text)]
    assert coordinator.handle(m.Leave(0, 1), 5.0) == coordinator.handle(m.Leave(2, 1), 5.0) == []
    assert coordinator.over


def test_a_run_that_goes_on_without_a_lost_member_lets_it_join_anew() -> None:
    coordinator = Coordinator(3, SSP(0), on_loss="go on")
    started(coordinator, 3)
    for rank in (0, 1):
        assert coordinator.handle(m.Push(rank, 1), 1.0) == []
    assert coordinator.handle(m.Lose(2, 1), 2.0) == [m.Released(0, 1, 0), m.Released(1, 1, 0)]
    assert coordinator.handle(m.Push(2, 1), 3.0) == [m.Fenced(2, 1)]
    assert coordinator.handle(m.Join(2, 202), 4.0) == [m.Joined(2, 2)]
    assert coordinator.failure is None


def test_a_lease_that_was_taken_back_is_refused_and_its_batch_granted_again() -> None:
    leases = QueueLeases(batches=2, open_at_once=2)
    coordinator = Coordinator(2, ASP(), leases=leases, on_loss="go on")
    started(coordinator, 2)
    assert coordinator.handle(m.Request(0, 1), 1.0) == [m.Granted(0, 0, 0)]
    assert coordinator.handle(m.Request(1, 1), 1.0) == [m.Granted(1, 1, 1)]
    assert coordinator.handle(m.Push(0, 1, leases=(1,)), 2.0) == [m.Refused(0, 1)], "it is another's"
    assert coordinator.handle(m.Lose(1, 1), 3.0) == []
    assert coordinator.handle(m.Push(0, 1, leases=(0,)), 4.0) == [m.Released(0, 1, 0)]
    assert coordinator.handle(m.Request(0, 1), 5.0) == [m.Granted(0, 2, 1)]
    assert coordinator.handle(m.Push(0, 1, leases=(2,)), 6.0) == [m.Released(0, 2, 0)]
    assert leases.committed == [0, 1]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (m.Join(0, 7), "a second connection for rank 0"),
        (m.Join(2, 7), "rank 2 is none of this run"),
        (m.Join(-1, 7), "rank -1 is none of this run"),
        (m.Push(0, 1), "rank 0 has pushed before all have met"),
        (m.Request(0, 1), "nobody hands them out"),
    ],
)
def test_what_no_member_can_say(message: m.Message, problem: str) -> None:
    coordinator = Coordinator(2, ASP())
    coordinator.handle(m.Join(0, 6), 0.0)
    with pytest.raises(ValueError, match=problem):
        coordinator.handle(message, 1.0)


def test_no_gate_no_thresholds() -> None:
    coordinator = Coordinator(1)
    started(coordinator, 1)
    (reply,) = coordinator.handle(m.SetThresholds(0, 1, {"threshold": 1}), 1.0)
    assert reply == m.ThresholdsSet(0, "there is no paradigm here")


def test_everything_is_recorded_in_order() -> None:
    told: list[events.Event] = []
    coordinator = Coordinator(1, SSP(2), record=told.append)
    started(coordinator, 1)
    coordinator.handle(m.Push(0, 1), 1.0)
    coordinator.handle(m.SetThresholds(0, 1, {"threshold": 5}), 2.0)
    coordinator.handle(m.Abort(0, 1, "interrupt", "was interrupted"), 3.0)
    coordinator.handle(m.Leave(0, 1), 4.0)
    assert told == [
        events.Joined(0.0, 0),
        events.Met(0.0, 0),
        events.Released(1.0, 0, lead=0),
        events.ThresholdsSet(2.0, {"threshold": 5}),
        events.Failed(3.0, "interrupt", "rank 0 was interrupted"),
        events.Left(4.0, 0),
    ]
