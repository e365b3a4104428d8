"""What is derived from a run's events: of hand-written ones, and of simulated runs, which must come out again."""

from __future__ import annotations

import pytest

from lightning_stale.events import Committed, Event, Granted, Joined, Left, Met, Pushed, Released, Spent, ThresholdsSet
from lightning_stale.simulation import Cluster, StepTimes, draw, parse_setting, run, step_times_of


def push(at: float, worker: int, wait_s: float, compute_s: float) -> list[Event]:
    return [Spent(at, worker, wait_s, compute_s), Pushed(at, worker, staleness=0)]


def test_what_the_server_held_back_is_no_exchange() -> None:
    """Worker 1 is slower under BSP: worker 0 waits 3 s, of which the exchange took half a second."""
    events: list[Event] = [Joined(0.0, 0), Joined(0.0, 1), Met(1.0, 0), Met(1.0, 1), ThresholdsSet(1.0, {})]
    events += [*push(2.25, 0, 0.5, 1.0), *push(4.75, 1, 0.5, 3.5), Released(4.75, 1, 0), Released(4.75, 0, 0)]
    events += [*push(6.25, 0, 3.0, 1.0), *push(9.0, 1, 0.75, 3.5), Released(9.25, 1, 0), Released(9.25, 0, 0)]
    times = step_times_of(events, "by hand")
    assert times.computing == StepTimes("by hand", ((1.0, 1.0), (3.5, 3.5)))
    assert times.turnaround == StepTimes("by hand", ((1.25, 1.5), (3.75, 4.25)))
    assert times.cluster == Cluster(exchange_s=(0.5 + 0.75) / 2, update_s=(0.0 + 0.25) / 2)


def test_an_ok_on_demand_comes_with_a_batch_and_a_meeting_is_no_exchange() -> None:
    events: list[Event] = [Met(0.0, 0), Granted(0.5, 0, 0, 0, 1), *push(2.0, 0, 0.25, 1.0), Committed(2.0, 0, 0)]
    events += [Granted(5.0, 0, 2, 2, 3), Released(5.0, 0, 1), *push(6.5, 0, 3.25, 1.25), Released(6.5, 0, 2)]
    events += [Spent(6.75, 0, 0.25, 0.125), Met(9.0, 0), Granted(9.5, 0, 3, 3, 4), *push(11.5, 0, 2.5, 2.0)]
    times = step_times_of(events)
    assert times.computing.of == ((1.0, 1.25, 2.0),)
    assert times.turnaround.of == ((2.0, 1.5, 2.5),)
    assert times.cluster.exchange_s == 0.25, "the wait of 2.5 s was for the others at the meeting"


def test_who_is_lost_takes_its_unfinished_step_along_and_another_begins_anew() -> None:
    events: list[Event] = [
        Met(0.0, 0),
        Met(0.0, 1),
        *push(1.0, 1, 0.0, 1.0),
        Released(1.0, 1, 0),
        Left(9.0, 1, lost=True),
    ]
    events += [Joined(20.0, 1), Granted(21.0, 1, 5, 5, 6), *push(23.0, 1, 0.0, 1.5), Left(24.0, 0)]
    assert step_times_of(events).turnaround.of == ((1.0, 2.0),)


def test_a_run_without_a_push_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing: no worker has pushed a gradient: record a run of StaleSync"):
        step_times_of([Met(0.0, 0), Released(1.0, 0, 0)], "nothing")


@pytest.mark.parametrize(
    "setting", ["bsp", "asp", "ssp:1", "dssp:1:4", "asp@on-demand", "ssp:2@on-demand", "bounded-delay:5"]
)
def test_a_simulated_run_comes_out_again_from_its_own_events(setting: str) -> None:
    times = draw(4, 1.0, factors=[2.3], jitter=0.3, steps=40)
    cluster = Cluster(exchange_s=0.25)
    events: list[Event] = []
    outcome = run(parse_setting(setting), times, cluster, steps=20, epochs=2, record=events.append)
    assert sum(isinstance(event, Pushed) for event in events) == outcome.batches == 160
    found = step_times_of(events)
    for mine, of in zip(found.computing.of, times.of, strict=True):
        assert mine == pytest.approx(of[: len(mine)] if len(mine) <= 40 else [*of, *of][: len(mine)])
    assert found.cluster.exchange_s == pytest.approx(0.25)
    assert found.cluster.update_s == 0.0
    again = run(parse_setting(setting), found.computing, found.cluster, steps=20, epochs=2)
    assert again.seconds == pytest.approx(outcome.seconds)
    assert again.waiting == pytest.approx(outcome.waiting)
    assert again.staleness == outcome.staleness
    free = run(parse_setting(setting), found.turnaround, steps=20, epochs=2)
    assert free.seconds == pytest.approx(outcome.seconds, abs=0.3)  # of the last exchange of each epoch
    assert free.staleness == outcome.staleness
