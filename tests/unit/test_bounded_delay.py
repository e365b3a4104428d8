"""Bounded delay over data on demand: two simulations that agree, published figures, and the delay that adapts."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stale import ASP, SSP, BoundedDelay, StaleSyncStrategy, ThresholdSchedule
from lightning_stale.paradigms.adaptive_delay import smallest_delay, waiting_share
from lightning_stale.parameter_server.client import Meeting
from tests.unit.on_demand import Durations, drive, formula, step_times
from tests.unit.test_paradigms import ROUND_TRIPS

# --- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 7])
def test_a_lease_is_granted_while_none_is_open_that_is_delay_or_more_before_it(delay: int) -> None:
    paradigm = BoundedDelay(delay)
    assert [paradigm.allows(lease, oldest=10) for lease in range(10, 10 + delay + 2)] == [True] * delay + [False] * 2


def test_the_delay_follows_the_workers() -> None:
    paradigm, seen = BoundedDelay(), []
    for worker in range(4):
        seen.append(paradigm.delay)
        paradigm.join(worker, 0.0)
    for worker in range(4):
        seen.append(paradigm.delay)
        paradigm.leave(worker, 1.0)
    assert [*seen, paradigm.delay] == [2, 2, 4, 6, 8, 6, 4, 2, 2]


# --- two simulations ----------------------------------------------------------------------------------------------

eighths = st.integers(0, 40).map(lambda n: n / 8)  # many end at the same time


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Durations, int]:
    """Workers, and how many batches there are for them."""
    durations = draw(st.lists(st.lists(eighths, min_size=1, max_size=4), min_size=1, max_size=6))
    return durations, len(durations) * draw(st.integers(1, 8)) + draw(st.integers(0, len(durations) - 1))


bounded_delays = st.one_of(
    st.builds(BoundedDelay, st.integers(1, 12)),
    st.builds(BoundedDelay),
    st.builds(
        lambda low, room: BoundedDelay("auto", lower=low, upper=low + room), st.integers(1, 4), st.integers(0, 9)
    ),
)


def seen_once(trained: list[tuple[int, int]], batches: int) -> bool:
    return sorted(itertools.chain.from_iterable(range(*each) for each in trained)) == list(range(batches))


@settings(max_examples=300)
@given(
    world=worlds(),
    paradigm=bounded_delays,
    lost=st.dictionaries(st.integers(1, 40), st.integers(0, 5), max_size=4),
    back=st.dictionaries(st.integers(1, 40), st.integers(0, 5), max_size=4),
    changes=st.dictionaries(st.integers(1, 40), st.integers(1, 12), max_size=2),
)
def test_every_batch_is_trained_once_and_staleness_is_bounded(
    world: tuple[Durations, int],
    paradigm: BoundedDelay,
    lost: dict[int, int],
    back: dict[int, int],
    changes: dict[int, int],
) -> None:
    """Whoever is lost and comes back, and whatever the delay becomes; that it ends says that nobody waits for ever."""
    durations, batches = world
    workers = len(durations)
    paradigm = copy.deepcopy(paradigm)
    first = copy.deepcopy(paradigm)
    for worker in range(workers):
        first.join(worker, 0.0)
    run = drive(paradigm, durations, batches, lost=lost, back=back, changes=changes)
    assert seen_once(run.trained, batches)
    assert set(paradigm.clocks) <= run.over
    largest = max([first.delay, *run.delays, *changes.values()])
    assert max(run.staleness) <= (largest - 1) + (workers - 1)
    assert run.open_at_once <= min(workers, largest)


@given(worlds())
def test_a_delay_of_one_is_sequential(world: tuple[Durations, int]) -> None:
    durations, batches = world
    run = drive(BoundedDelay(1), durations, batches)
    ordered = [run.leases[number] for number in range(batches)]
    assert run.open_at_once == 1
    assert set(run.staleness) == {0}
    assert all(one.end == next_.begin for one, next_ in itertools.pairwise(ordered))
    assert [lease.worker for lease in ordered] == [number % len(durations) for number in range(batches)]


@settings(max_examples=200)
@given(
    workers=st.integers(1, 8), each=st.integers(1, 12), delay=st.integers(1, 30) | st.none(), seed=st.integers(0, 9999)
)
def test_both_simulations_agree(workers: int, each: int, delay: int | None, seed: int) -> None:
    generator = random.Random(seed)
    speeds = [generator.choice([1.0, 1.0, 1.0, 2.3, 7.0]) for _ in range(workers)]
    durations = [[speed * generator.uniform(0.5, 1.5) for _ in range(5)] for speed in speeds]
    batches = workers * each
    driven = drive(ASP() if delay is None else BoundedDelay(delay), durations, batches)
    expected = formula(durations, batches, math.inf if delay is None else delay)
    assert driven.makespan == expected.makespan
    assert driven.staleness == expected.staleness
    assert [driven.leases[number] for number in range(batches)] == [expected.leases[n] for n in range(batches)]


# --- the published figures of ../shared/data/traces/README.md -----------------------------------------------------

PASSES = 20

ON_DEMAND = {  # steps/s over BSP, and the largest staleness; the delay in workers, inf for ASP
    "SE": {math.inf: (1.26, 57), 1.0: (1.14, 50), 1.5: (1.26, 55), 2.0: (1.26, 57)},
    "AR": {math.inf: (1.94, 9), 1.0: (1.75, 6), 1.5: (1.87, 8), 2.0: (1.94, 9)},
}


@pytest.mark.parametrize(("job", "delay"), [(job, delay) for job in ON_DEMAND for delay in ON_DEMAND[job]])
def test_step_times_of_real_jobs(job: str, delay: float) -> None:
    """All batches of 20 passes over the steps: BSP takes the slowest of each step, and its workers as many batches."""
    times = step_times(job)
    workers, steps = len(times), len(times[0])
    assert (workers, steps) == {"SE": (32, 43), "AR": (4, 44)}[job]
    bsp = PASSES * sum(max(step) for step in zip(*times, strict=True))
    paradigm = ASP() if math.isinf(delay) else BoundedDelay(int(delay * workers))
    run = drive(paradigm, times, PASSES * steps * workers)
    assert (round(bsp / run.makespan, 2), max(run.staleness)) == ON_DEMAND[job][delay]


@pytest.mark.parametrize(("job", "gain", "delays"), [("SE", 1.25, (32, 64)), ("AR", 1.92, (6, 8))])
def test_auto_keeps_what_there_is_to_gain_with_less_than_twice_the_workers(
    job: str, gain: float, delays: tuple[int, int]
) -> None:
    times = step_times(job)
    run = drive(BoundedDelay("auto"), times, PASSES * len(times[0]) * len(times))
    bsp = PASSES * sum(max(step) for step in zip(*times, strict=True))
    assert bsp / run.makespan == pytest.approx(gain, abs=0.01)
    later = run.delays[20 * len(times) :]
    assert delays[0] <= min(later) <= max(later) <= delays[1]


# --- auto ---------------------------------------------------------------------------------------------------------


def one_slow(workers: int, factor: float, jitter: float = 0.0, seed: int = 0, steps: int = 20) -> list[list[float]]:
    generator = random.Random(seed)
    speeds = [factor, *[1.0] * (workers - 1)]
    return [[speed * generator.uniform(1 - jitter, 1 + jitter) for _ in range(steps)] for speed in speeds]


@pytest.mark.parametrize("factor", [1.5, 2.0, 2.3, 3.0, 4.0, 7.0])
def test_auto_finds_what_a_worker_that_is_slow_for_good_needs(factor: float) -> None:
    """``1 + (N - 1) f``, or one less where that costs less than the share that is asked for."""
    run = drive(BoundedDelay("auto"), one_slow(4, factor), 1200)
    assert run.delays[0] == 8
    assert abs(run.delays[-1] - (1 + 3 * factor)) <= 1


@pytest.mark.parametrize("factor", [1.5, 2.0, 2.3, 3.0, 4.0, 7.0])
@pytest.mark.parametrize(("jitter", "seed"), [(0.02, 1), (0.02, 2), (0.1, 3)])
def test_auto_finds_the_smallest_that_waits_less_than_asked_for(factor: float, jitter: float, seed: int) -> None:
    """Or one beside it: what a long simulation of all durations says, ``auto`` has to see in the last eight of each."""
    durations = one_slow(4, factor, jitter, seed)
    smallest = next(delay for delay in itertools.count(1) if formula(durations, 1000, delay).waiting_share < 0.02)
    later = drive(BoundedDelay("auto"), durations, 1200).delays[400:]
    assert sum(abs(delay - smallest) <= 1 for delay in later) > 0.9 * len(later)
    assert max(later) <= smallest + 2


@pytest.mark.parametrize(("workers", "factor"), [(2, 5.0), (8, 2.3), (16, 1.7), (32, 2.3)])
def test_auto_takes_no_more_than_is_needed_and_waits_less_than_asked_for(workers: int, factor: float) -> None:
    durations = one_slow(workers, factor, 0.03)
    delay = drive(BoundedDelay("auto"), durations, 40 * workers).delays[-1]
    assert workers < delay <= 2 + (workers - 1) * factor
    assert formula(durations, 30 * workers, delay).waiting_share < 0.03
    assert formula(durations, 30 * workers, workers).waiting_share > 0.05


@pytest.mark.parametrize(("workers", "jitter", "above"), [(2, 0.0, 0), (4, 0.0, 0), (4, 0.05, 1), (16, 0.05, 2)])
def test_auto_falls_to_the_number_of_equal_workers(workers: int, jitter: float, above: int) -> None:
    delays = drive(BoundedDelay("auto"), one_slow(workers, 1.0, jitter), 60 * workers).delays
    assert delays[0] == 2 * workers
    assert workers <= delays[-1] <= workers + above


def test_auto_rises_and_falls_with_what_it_sees() -> None:
    """Worker 0 is slow for a while; the last durations count, and nothing before them."""
    durations = [[1.0] * 40 + [5.0] * 40 + [1.0] * 400, *[[1.0] * 2000] * 3]
    delays = drive(BoundedDelay("auto"), durations, 1000).delays
    assert (delays[100], max(delays), delays[-1]) == (4, pytest.approx(16, abs=1), 4)


def test_auto_is_deterministic() -> None:
    durations = one_slow(5, 2.0, 0.3, seed=3)
    runs = [drive(BoundedDelay("auto", waiting=0.05), durations, 600) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0].delays)) > 2


@pytest.mark.parametrize(
    ("limits", "low", "high"),
    [
        ({"lower": 6}, 6, 32),
        ({"upper": 9}, 4, 9),
        ({"upper": 3}, 3, 3),  # below N
        ({"lower": 40}, 40, 40),  # above 8 N
        ({"lower": 5, "upper": 11}, 5, 11),
        ({}, 4, 32),
    ],
)
def test_auto_stays_within_its_limits(limits: dict[str, int], low: int, high: int) -> None:
    for factor, expected in ((1.0, low), (30.0, high)):
        paradigm = BoundedDelay("auto", **limits)  # type: ignore[arg-type]
        delays = drive(paradigm, one_slow(4, factor), 1200).delays
        assert set(delays) <= set(range(low, high + 1))
        assert delays[-1] == expected


def feed(paradigm: BoundedDelay, rounds: int, durations: dict[int, float], at: float = 0.0) -> list[int]:
    """Let every worker have a lease per round."""
    delays = []
    for _ in range(rounds):
        for worker, duration in durations.items():
            paradigm.note_grant(worker, at)
            paradigm.note_commit(worker, at + duration)
            delays.append(paradigm.delay)
        at += max(durations.values())
    return delays


def joined(paradigm: BoundedDelay, workers: int, now: float = 0.0) -> BoundedDelay:
    for worker in range(workers):
        paradigm.join(worker, now)
    return paradigm


def test_auto_looks_whenever_four_leases_per_worker_are_committed() -> None:
    delays = feed(joined(BoundedDelay("auto"), 4), 12, {0: 1.0, 1: 1.0, 2: 1.0, 3: 3.0})
    assert (delays[:15], len(set(delays[15:]))) == ([8] * 15, 1)
    assert delays[15] == pytest.approx(10, abs=1)


def test_auto_waits_until_it_knows_everybody() -> None:
    paradigm = joined(BoundedDelay("auto"), 3)
    feed(paradigm, 20, {0: 1.0, 1: 1.0})
    feed(paradigm, 1, {2: 4.0})
    assert paradigm.delay == 6
    feed(paradigm, 1, {2: 4.0})
    assert paradigm.delay == pytest.approx(9, abs=1)


def test_what_auto_knows_outlasts_a_meeting() -> None:
    paradigm = joined(BoundedDelay("auto"), 4)
    feed(paradigm, 8, {0: 1.0, 1: 1.0, 2: 1.0, 3: 5.0})
    found = paradigm.delay
    assert found > 12
    for worker in range(4):
        paradigm.note_grant(worker, 100.0)  # which does not come to be committed
        paradigm.leave(worker, 100.0)
    joined(paradigm, 4, 200.0)
    assert paradigm.delay == found
    for worker in range(4):
        paradigm.note_commit(worker, 300.0)
    assert feed(paradigm, 4, {0: 1.0, 1: 1.0, 2: 1.0, 3: 5.0}, 300.0) == [found] * 16


def test_auto_leaves_out_who_is_gone_and_its_limits_follow() -> None:
    paradigm = joined(BoundedDelay("auto"), 4)
    feed(paradigm, 8, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})
    assert paradigm.delay > 24
    paradigm.leave(3, 50.0)
    assert paradigm.delay == 24  # 8 N
    feed(paradigm, 8, {0: 1.0, 1: 1.0, 2: 1.0}, 50.0)
    assert paradigm.delay == 3


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.3, 6.0])
@pytest.mark.parametrize("delay", [1, 2, 3, 4, 6, 8, 12])
def test_the_share_of_waiting_is_that_of_a_long_simulation(factor: float, delay: int) -> None:
    durations = one_slow(4, factor, 0.1, steps=4)
    assert waiting_share(durations, delay) == pytest.approx(formula(durations, 1500, delay).waiting_share, abs=0.025)


@settings(max_examples=200)
@given(
    durations=st.lists(st.lists(eighths, min_size=1, max_size=4), min_size=1, max_size=5),
    lower=st.integers(1, 6),
    room=st.integers(0, 25),
    start=st.integers(0, 25),
    waiting=st.sampled_from([0.001, 0.02, 0.1, 0.5]),
)
def test_the_search_ends_where_one_less_waits_too_long(
    durations: Durations, lower: int, room: int, start: int, waiting: float
) -> None:
    upper = lower + room
    found = smallest_delay(durations, lower=lower, upper=upper, waiting=waiting, start=lower + min(start, room))
    assert lower <= found <= upper
    assert found == upper or waiting_share(durations, found) < waiting
    assert found == lower or waiting_share(durations, found - 1) >= waiting


@pytest.mark.parametrize("start", [4, 5, 12, 13, 14, 31, 32, 1000])
def test_the_search_ends_at_the_same_delay_wherever_it_starts(start: int) -> None:
    assert smallest_delay(one_slow(4, 4.0), lower=4, upper=1000, waiting=0.02, start=start) == 13


# --- thresholds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paradigm", [BoundedDelay(8), BoundedDelay(), BoundedDelay("auto", upper=20)], ids=repr)
def test_set_thresholds_fixes_the_delay(paradigm: BoundedDelay) -> None:
    paradigm = joined(copy.deepcopy(paradigm), 4)
    feed(paradigm, 3, {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0})
    assert paradigm.thresholds == {"delay": 8}
    assert paradigm.set_thresholds(1.0, delay=5) == []
    assert feed(paradigm, 12, {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}) == [5] * 48
    paradigm.leave(3, 60.0)
    assert (paradigm.thresholds, repr(paradigm)) == ({"delay": 5}, "BoundedDelay(delay=5)")
    other = BoundedDelay(5)
    other.load_state_dict(paradigm.state_dict())
    assert (repr(other), other.state_dict()) == (repr(paradigm), paradigm.state_dict())


@pytest.mark.parametrize("paradigm", [BoundedDelay(3), BoundedDelay(), BoundedDelay("auto")], ids=repr)
def test_a_copy_that_follows_shows_the_delay_and_stays_what_it_is(paradigm: BoundedDelay) -> None:
    strategy = StaleSyncStrategy(paradigm=copy.deepcopy(paradigm))
    strategy._update._note_meeting(Meeting({"delay": 7}, ((0, 1),)))
    shown = strategy.paradigm
    assert shown.thresholds == {"delay": 7}
    fixed = "delay=3" in repr(paradigm)
    assert repr(shown) == ("BoundedDelay(delay=7)" if fixed else repr(paradigm))
    assert isinstance(shown, BoundedDelay)
    assert joined(shown, 4).delay == (7 if fixed else 8)  # as for the next fit, in the server


def test_a_copy_of_ssp_that_follows_has_the_thresholds() -> None:
    paradigm = SSP(3)
    paradigm.follow_thresholds({"threshold": 5})
    assert repr(paradigm) == "SSP(threshold=5)"


def test_a_schedule_changes_the_delay() -> None:
    strategy = StaleSyncStrategy(paradigm=BoundedDelay(9))
    for schedule, expected in (
        (ThresholdSchedule(milestones={0: {"delay": 5}}).milestones_due(0), 5),
        (ThresholdSchedule(monitor="loss", patience=1).thresholds_after(math.nan, {"delay": 5}), 2),
    ):
        strategy.set_thresholds(**schedule)
        assert strategy.paradigm.thresholds == {"delay": expected}


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", ROUND_TRIPS, ids=["parcel", "msgpack", "torch.save"])
def test_auto_goes_on_by_another_clock(carry: Callable[[Any], Any]) -> None:
    durations = {0: 1.0, 1: 1.125, 2: 0.875, 3: 3.5}
    first = joined(BoundedDelay("auto"), 4)
    feed(first, 7, durations)
    state = first.state_dict()
    frozen = copy.deepcopy(state)
    second = BoundedDelay("auto")
    second.load_state_dict(carry(state))
    assert second.state_dict() == frozen
    for worker in range(4):  # as the server does when it resumes
        second.leave(worker, 5000.0)
    joined(second, 4, 5000.0)
    slower = {**durations, 3: 6.0}
    delays = feed(first, 9, slower, at=40.0)
    assert delays == feed(second, 9, slower, at=5000.0)
    assert len(set(delays)) > 1
    assert state == frozen, "the state shares memory with the paradigm it was taken from"
    assert second.state_dict()["adaptation"] == first.state_dict()["adaptation"]


def test_a_lease_that_was_open_leaves_no_duration_after_a_resume() -> None:
    first, second = joined(BoundedDelay("auto"), 2), BoundedDelay("auto")
    first.note_grant(0, 100.0)
    second.load_state_dict(first.state_dict())
    first.load_state_dict(first.state_dict())
    for paradigm in (first, second):
        paradigm.note_commit(0, 3.0)
    assert first.state_dict() == second.state_dict()
    assert second.state_dict()["adaptation"] == {"delay": None, "commits": 0, "durations": {}}


def test_a_fixed_delay_and_auto_take_each_others_states() -> None:
    adapted = joined(BoundedDelay("auto"), 2)
    feed(adapted, 12, {0: 1.0, 1: 5.0})
    fixed = BoundedDelay(3)
    fixed.load_state_dict(adapted.state_dict())
    assert (fixed.delay, fixed.clocks) == (3, adapted.clocks)
    again = BoundedDelay("auto")
    again.load_state_dict(fixed.state_dict())
    assert again.delay == 4


# --- bad arguments ------------------------------------------------------------------------------------------------

NOT_COUNTS = [0, -1, True, False, 1.5, 3.0, "3", "Auto", "", math.nan, [4]]


@pytest.mark.parametrize("value", NOT_COUNTS)
def test_a_delay_is_a_count_of_leases(value: Any) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1, 'auto', or None for twice the workers") as error:
        BoundedDelay(value)
    assert f"BoundedDelay(delay={value!r})" in str(error.value)
    assert "e.g. BoundedDelay(delay=8)" in str(error.value)


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("name", ["lower", "upper"])
def test_limits_are_counts_of_leases(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} counts leases and must be an integer >= 1;") as error:
        BoundedDelay("auto", **{name: value})
    assert f"BoundedDelay(delay='auto', {name}={value!r})" in str(error.value)


def test_lower_must_not_exceed_upper() -> None:
    with pytest.raises(ValueError, match="lower must not exceed upper; did you mean lower=2, upper=5"):
        BoundedDelay("auto", lower=5, upper=2)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, True, "0.02", None, math.nan])
def test_waiting_is_a_share(value: Any) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, e\.g\. 0\.02") as error:
        BoundedDelay("auto", waiting=value)
    assert f"waiting={value!r}" in str(error.value)


@pytest.mark.parametrize("delay", [None, 8])
@pytest.mark.parametrize("argument", [{"lower": 2}, {"upper": 9}, {"waiting": 0.1}], ids=repr)
def test_what_belongs_to_auto_is_refused_without_it(delay: int | None, argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are for delay='auto': write that, or leave them out") as error:
        BoundedDelay(delay, **argument)
    assert f"delay={delay!r}" in str(error.value)
    assert "{}={}".format(*next(iter(argument.items()))) in str(error.value)


@pytest.mark.parametrize(
    ("thresholds", "text"),
    [
        *(
            ({"delay": value}, f"BoundedDelay(delay={value!r}): delay counts leases")
            for value in (0, True, 2.0, "auto")
        ),
        ({"threshold": 3}, "set_thresholds(threshold=3): BoundedDelay has delay, e.g. set_thresholds(delay=8)"),
    ],
)
def test_impossible_changes_are_refused_and_change_nothing(thresholds: dict[str, Any], text: str) -> None:
    paradigm = joined(BoundedDelay("auto"), 4)
    before = paradigm.state_dict()
    with pytest.raises(ValueError, match=re.escape(text)):
        paradigm.set_thresholds(1.0, **thresholds)
    assert (paradigm.state_dict(), paradigm.delay, paradigm.auto) == (before, 8, True)


@pytest.mark.parametrize(
    ("paradigm", "text"),
    [
        (BoundedDelay(), "BoundedDelay(delay=None)"),
        (BoundedDelay(8), "BoundedDelay(delay=8)"),
        (BoundedDelay("auto", upper=9), "BoundedDelay(delay='auto', lower=None, upper=9, waiting=0.02)"),
    ],
)
def test_repr_says_how_to_make_it(paradigm: BoundedDelay, text: str) -> None:
    assert repr(paradigm) == text
    assert repr(eval(text)) == text
