"""Messages in turn: recorded as they come, and replayed in that order whatever the order in which they come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stale import events as e
from lightning_stale.recording.turns import DiffersError, RecordedTurns, ReplayedTurns, ReplayError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.0000017
        return self.now


def recorded(messages: list[tuple[int, Any]]) -> tuple[list[e.Event], list[tuple[int, str, float]]]:
    told: list[e.Event] = []
    taken: list[tuple[int, str, float]] = []
    turns = RecordedTurns(told.append, Clock())
    for worker, what in messages:
        turns.take(worker, what, lambda worker=worker, what=what: taken.append((worker, what, turns.now())))
    return told, taken


@given(
    workers=st.lists(st.lists(st.sampled_from(["push", "request", "sync"]), max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_order_becomes_that_of_the_record(workers: list[list[Any]], data: st.DataObject) -> None:
    """Each worker's own messages come in its own order, which is all that is certain."""

    def some_order() -> list[tuple[int, Any]]:
        places = data.draw(st.permutations([rank for rank, said in enumerate(workers) for _ in said]))
        left = [iter(said) for said in workers]
        return [(rank, next(left[rank])) for rank in places]

    record, expected = recorded(some_order())
    again: list[e.Event] = []
    taken: list[tuple[int, str, float]] = []
    turns = ReplayedTurns(record, lose=lambda worker: None, record=again.append)
    for worker, what in some_order():
        turns.take(worker, what, lambda worker=worker, what=what: taken.append((worker, what, turns.now())))
    assert taken == expected  # at the very same times
    assert again == record


def test_time_is_whole_microseconds_and_stands_still_in_a_turn() -> None:
    told: list[e.Event] = []
    turns = RecordedTurns(told.append, Clock())
    seen: list[float] = []
    turns.take(0, "push", lambda: seen.extend([turns.now(), turns.now()]))
    assert seen[0] == seen[1] == told[0].at
    assert seen[0] * 1e6 == round(seen[0] * 1e6)


def test_who_was_lost_is_lost_when_it_is_its_turn_and_what_it_says_after_that_is_not_heard() -> None:
    told: list[Any] = []
    record = [e.Turn(1.0, 0, "push"), e.Turn(2.0, 1, "lost"), e.Turn(3.0, 0, "sync")]
    turns = ReplayedTurns(record, lose=lambda worker: told.append(("lost", worker, turns.now())))
    turns.take(1, "push", lambda: told.append("never"))  # which it came no more to in the record
    assert told == []
    assert turns.awaited() == "a 'push' of rank 0 follows"
    turns.take(0, "push", lambda: told.append("push"))
    turns.take(0, "sync", lambda: told.append("sync"))
    assert told == ["push", ("lost", 1, 2.0), "sync"]
    assert turns.awaited() is None


def test_what_was_recorded_after_a_turn_is_expected_in_it() -> None:
    record = [e.Turn(1.0, 0, "push"), e.Pushed(1.0, 0, 3), e.Turn(2.0, 0, "push"), e.Pushed(2.0, 0, 5)]
    turns = ReplayedTurns(record, lose=lambda worker: None)
    seen: list[Any] = []

    def push() -> None:
        pushed = turns.expected(e.Pushed)
        seen.append((pushed, turns.expected(e.Fingerprint)))
        assert pushed is not None
        turns.note(pushed)

    for _ in range(2):
        turns.take(0, "push", push)
    assert seen == [(record[1], None), (record[3], None)]


def test_another_message_than_that_of_the_record_is_named() -> None:
    turns = ReplayedTurns([e.Turn(1.0, 2, "push")], lose=lambda worker: None)
    with pytest.raises(
        DiffersError, match=r"rank 2 has come to a 'sync' where in the record a 'push' of rank 2 follows"
    ):
        turns.take(2, "sync", lambda: None)


def test_who_does_another_thing_is_found_out_before_its_turn_which_may_never_come() -> None:
    record = [e.Turn(1.0, 0, "push"), e.Turn(2.0, 1, "push")]
    turns = ReplayedTurns(record, lose=lambda worker: None, ahead=record)
    with pytest.raises(DiffersError, match="rank 1 has come to a 'sync' where in the record a 'push' of rank 1"):
        turns.take(1, "sync", lambda: None)
    heard: list[str] = []
    turns = ReplayedTurns(record, lose=lambda worker: None, ahead=record)
    turns.take(1, "abort", lambda: heard.append("abort"))  # rank 0 may wait for it, and never push
    assert heard == ["abort"]


def test_another_consequence_than_in_the_record_is_named_though_the_message_is_the_same() -> None:
    record = [e.Turn(1.0, 0, "request"), e.Planned(1.0, 0, 24), e.Turn(2.0, 0, "push")]
    turns = ReplayedTurns(record, lose=lambda worker: None)
    with pytest.raises(
        DiffersError, match=r"the 'request' of rank 0 follows Planned\(.*batches=9\), and in the record"
    ):
        turns.take(0, "request", lambda: turns.note(e.Planned(1.0, 0, 9)))
    turns = ReplayedTurns(record, lose=lambda worker: None)
    with pytest.raises(DiffersError, match="follows nothing more, and in the record Planned"):
        turns.take(0, "request", lambda: None)
    turns = ReplayedTurns(record[:1], lose=lambda worker: None)
    turns.take(0, "request", lambda: turns.note(e.Planned(1.0, 0, 9)))  # the record was cut off here


def test_a_worker_that_fails_is_heard_though_it_did_not_fail_in_the_record() -> None:
    heard: list[str] = []
    turns = ReplayedTurns([e.Turn(1.0, 2, "push")], lose=lambda worker: None)
    turns.take(2, "abort", lambda: heard.append("abort"))
    assert heard == ["abort"]


def test_a_worker_that_dies_though_it_did_not_in_the_record_is_named() -> None:
    turns = ReplayedTurns([e.Turn(1.0, 2, "push"), e.Turn(1.0, 1, "bye")], lose=lambda worker: None)
    turns.take(1, "bye", lambda: None)
    turns.lose(1, lambda: None)  # it has said goodbye, which has its turn yet
    with pytest.raises(DiffersError, match="rank 2 is gone, and in the record it is there"):
        turns.lose(2, lambda: None)


def test_nothing_is_made_up_after_the_end_of_the_record() -> None:
    turns = ReplayedTurns([], lose=lambda worker: None)
    with pytest.raises(ReplayError, match="the record that is replayed ends here"):
        turns.take(0, "push", lambda: None)


def test_after_a_failure_all_that_waits_is_taken() -> None:
    heard: list[int] = []
    turns = ReplayedTurns([e.Turn(1.0, 2, "push")], lose=lambda worker: None)
    for worker in (0, 1):
        turns.take(worker, "push", lambda worker=worker: heard.append(worker))
    turns.ended()
    turns.take(3, "bye", lambda: heard.append(3))
    turns.lose(4, lambda: heard.append(4))
    assert heard == [0, 1, 3, 4]
