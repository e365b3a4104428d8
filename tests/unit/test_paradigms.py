"""The paradigms: literal tables, an independent reference on random traces, invariants, state, and bad arguments."""

from __future__ import annotations

import copy
import io
import itertools
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_stale.paradigms import ASP, BSP, DSSP, PARADIGMS, SSP, BoundedDelay, Paradigm, as_paradigm
from tests.unit.reference import Event, RawEvent, Table, apply_event, best_grant, play, simulate
from tests.unit.test_parcel import carried

moderate = settings(max_examples=120)

# --- literal tables -----------------------------------------------------------------------------------------------

TWO_SLOW_PUSHES = """
    join 0 @ 0; join 1 @ 0
    push 0 -> 0 @ 1; push 0 -> @ 2; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6
"""  # of worker 1, three seconds apart; worker 0 is one clock ahead

THREE_WORKERS = """
    join 0 @ 0; join 1 @ 0; join 2 @ 0
    push 0 -> 0 @ 1; push 2 -> 2 @ 1; push 1 -> 1 @ 3
    push 0 -> 0 @ 3; push 2 -> 2 @ 3; push 1 -> 1 @ 6; push 0 -> 0 @ 7
"""  # worker 1 is the slowest; 0 is one ahead of it

# One entry per event: "join 0", "push 1 -> 1 0" (who is released, in order), "leave 2 -> 0"; each may have an "@ time".
TABLES: dict[str, tuple[Paradigm, str]] = {
    "bsp: two rounds of three": (
        BSP(),
        """
        join 0; join 1; join 2
        push 1 ->; push 0 ->; push 2 -> 2 1 0
        push 0 ->; push 2 ->; push 1 -> 1 0 2
        """,
    ),
    "bsp: one worker never waits": (BSP(), "join 0; push 0 -> 0; push 0 -> 0"),
    "bsp: who leaves completes the round of the others": (
        BSP(),
        "join 0; join 1; join 2; push 2 ->; push 0 ->; leave 1 -> 2 0; push 0 ->; push 2 -> 2 0",
    ),
    "bsp: who waits may leave, and the round goes on without it": (
        BSP(),
        "join 0; join 1; join 2; push 2 ->; leave 2 ->; push 0 ->; push 1 -> 1 0",
    ),
    "bsp: the last but one leaves": (BSP(), "join 0; join 1; push 0 ->; leave 1 -> 0; push 0 -> 0"),
    "bsp: who joins in the middle of a round takes part in it": (
        BSP(),
        "join 0; join 1; push 0 ->; join 2; push 1 ->; push 2 -> 2 0 1",
    ),
    "asp: nobody waits": (
        ASP(),
        "join 0; join 1; push 0 -> 0; push 0 -> 0; push 0 -> 0; push 1 -> 1; leave 1 ->; push 0 -> 0",
    ),
    "ssp(0): all meet at every clock": (
        SSP(0),
        "join 0; join 1; join 2; push 0 ->; push 1 ->; push 2 -> 2 0 1; push 2 ->; push 1 ->; push 0 -> 0 2 1",
    ),
    "ssp(2): two ahead, not three": (
        SSP(2),
        "join 0; join 1; push 0 -> 0; push 0 -> 0; push 0 ->; push 1 -> 1 0; push 0 ->; push 1 -> 1 0",
    ),
    "ssp(1): several wait, the oldest is released first": (
        SSP(1),
        "join 0; join 1; join 2; push 1 -> 1; push 0 -> 0; push 1 ->; push 0 ->; push 2 -> 2 1 0",
    ),
    "ssp(1): the slowest of two slow ones holds the rest": (
        SSP(1),
        "join 0; join 1; join 2; push 0 -> 0; push 0 ->; push 1 -> 1; push 2 -> 2 0",
    ),
    "ssp(1): who joins starts at the smallest clock": (
        SSP(1),
        """
        join 0; join 1; push 0 -> 0; push 1 -> 1; push 0 -> 0
        join 2; push 0 ->; push 2 -> 2; push 1 -> 1 0
        """,
    ),
    "ssp(1): leaves while others wait": (
        SSP(1),
        "join 0; join 1; join 2; push 2 -> 2; push 0 -> 0; push 0 ->; push 2 ->; leave 1 -> 0 2",
    ),
    "ssp(1): a leave that does not move the minimum releases nobody": (
        SSP(1),
        "join 0; join 1; join 2; push 0 -> 0; push 0 ->; leave 1 ->; push 2 -> 2 0",
    ),
    "ssp(1): who waited leaves and joins again at the smallest clock": (
        SSP(1),
        "join 0; join 1; push 0 -> 0; push 0 ->; leave 0 ->; join 0; push 0 -> 0; push 0 ->; push 1 -> 1 0",
    ),
    "ssp(1): after all have left, clocks go on from the largest": (
        SSP(1),
        """
        join 0; join 1; push 0 -> 0; push 0 ->; push 1 -> 1 0; leave 0 ->; leave 1 ->
        join 1; join 0; push 0 -> 0; push 0 ->; push 1 -> 1 0
        """,
    ),
    # At 7, the next pushes of 1 are predicted at 9, 12, 15 and those of 0 at 7, 8, 9: a grant of 2. At 9 they are
    # predicted at 9, 12, 15 and 9, 10, 11: none.
    "dssp: a grant of two is two OKs, the one that comes with it included": (
        DSSP(lower=1, upper=3),
        f"""
        {TWO_SLOW_PUSHES}
        push 0 -> 0 @ 7; push 0 -> 0 @ 8; push 0 -> @ 9
        push 1 -> 1 @ 9; push 1 -> 1 @ 12; push 1 -> 1 0 @ 15; push 0 -> 0 @ 16
        """,
    ),
    "dssp as printed: the OK that comes with the grant is free, and there is always another grant": (
        DSSP(lower=1, upper=3, enforce_upper=False),
        f"""
        {TWO_SLOW_PUSHES}
        push 0 -> 0 @ 7; push 0 -> 0 @ 8; push 0 -> 0 @ 9; push 1 -> 1 @ 9; push 0 -> 0 @ 10; push 0 -> 0 @ 11
        """,
    ),
    # at 8 with I_0 = 2: 8 and 10 are as far from 9
    "dssp: on a tie the smallest i, here 0": (
        DSSP(lower=1, upper=2),
        f"{TWO_SLOW_PUSHES}; push 0 -> @ 8; push 1 -> 1 0 @ 9",
    ),
    # grants of 1 at 7.5 (9 is predicted for i = 1), of 2 at 8 (9 for i = 2) with lead 3, of 2 at 8.25 with lead 4
    "dssp: a grant is clipped to upper - lead + 1": (
        DSSP(lower=1, upper=3),
        f"{TWO_SLOW_PUSHES}; push 0 -> 0 @ 7.5; push 0 -> 0 @ 8; push 0 -> @ 8.25; push 1 -> 1 @ 9; push 1 -> 1 @ 9",
    ),
    "dssp: who ties for the largest clock gets a grant": (
        DSSP(lower=1, upper=3),
        f"{THREE_WORKERS}; push 0 -> 0 @ 8; push 2 -> 2 @ 8; push 2 -> 2 @ 8.5",
    ),
    "dssp: who is not the fastest waits": (
        DSSP(lower=1, upper=3),
        f"{THREE_WORKERS}; push 0 -> 0 @ 8; push 0 -> 0 @ 8.25; push 2 -> 2 @ 8.25; push 2 -> @ 8.5; push 1 -> 1 2 @ 9",
    ),
    "dssp: no grant while the slowest has pushed fewer than twice": (
        DSSP(lower=0, upper=9),
        """
        join 0 @ 0; join 1 @ 0; push 0 -> @ 1; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6; push 0 -> 0 @ 7
        """,
    ),
    # 1 has pushed twice at 7 and is one clock behind at 8: that push uses up the credit of 1, and the one at 9 has none
    "dssp: credit is used up even where the lead is small again": (
        DSSP(lower=1, upper=3),
        f"""
        {TWO_SLOW_PUSHES}
        push 0 -> 0 @ 7; push 1 -> 1 @ 7; push 1 -> 1 @ 7; push 0 -> 0 @ 8; push 0 -> @ 9
        """,
    ),
    "dssp: no grant to who has pushed once since it joined": (
        DSSP(lower=0, upper=9),
        """
        join 0 @ 0; join 1 @ 0; push 0 -> @ 1; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6
        leave 0 -> @ 6; join 0 @ 6; push 0 -> @ 7; push 1 -> 1 0 @ 9; push 0 -> 0 @ 10
        """,
    ),
    "dssp: who joins again counts its pushes anew": (
        DSSP(lower=0, upper=9),
        """
        join 0 @ 0; join 1 @ 0; push 0 -> @ 1; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6
        leave 1 -> @ 6; join 1 @ 6; push 0 -> @ 7; push 1 -> 1 0 @ 9
        """,
    ),
    # the interval of 0 is 1 (from its OK at 6), not 3 (from its push at 4): 7, 8, 9 reach 9 at i = 2
    "dssp: processing time runs from the OK": (
        DSSP(lower=0, upper=2),
        """
        join 0 @ 0; join 1 @ 0; push 0 -> @ 1; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6
        push 0 -> 0 @ 7; push 0 -> 0 @ 8; push 0 -> @ 9
        """,
    ),
}


def parse(table: str) -> list[tuple[Event, list[int]]]:
    rows = []
    for line in table.replace("\n", ";").split(";"):
        if not line.strip():
            continue
        text, _, time = line.partition("@")
        event, _, released = text.partition("->")
        name, worker = event.split()
        rows.append(((name, int(worker), float(time or len(rows))), [int(p) for p in released.split()]))
    return rows


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    paradigm, table = TABLES[name]
    paradigm = copy.deepcopy(paradigm)
    rows = parse(table)
    assert [(event, apply_event(paradigm, event)) for event, _ in rows] == rows


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_reference_agree(name: str) -> None:
    paradigm, table = TABLES[name]
    reference = table_of(paradigm)
    rows = parse(table)
    assert [(event, reference.happen(*event)) for event, _ in rows] == rows


def test_clocks_and_leads() -> None:
    paradigm = SSP(threshold=2)
    for worker in (3, 1):
        paradigm.join(worker, 0.0)
    for _ in range(2):
        paradigm.push(3, 1.0)
    assert dict(paradigm.clocks) == {3: 2, 1: 0}
    assert (paradigm.lead(3), paradigm.lead(1)) == (2, 0)
    paradigm.push(1, 1.0)
    paradigm.join(2, 2.0)
    assert dict(paradigm.clocks) == {3: 2, 1: 1, 2: 1}
    for worker in (3, 1, 2):
        paradigm.leave(worker, 3.0)
    assert dict(paradigm.clocks) == {}
    paradigm.join(1, 4.0)
    assert dict(paradigm.clocks) == {1: 2}


# --- the reference on random traces -------------------------------------------------------------------------------


def table_of(paradigm: Paradigm) -> Table:
    """Return the reference for a fresh ``paradigm``."""
    if isinstance(paradigm, DSSP):
        return Table(paradigm.lower, paradigm.upper, paradigm.enforce_upper)
    if isinstance(paradigm, SSP):
        return Table(paradigm.threshold)
    return Table(0 if isinstance(paradigm, BSP) else math.inf)


@st.composite
def dssps(draw: st.DrawFn) -> DSSP:
    lower = draw(st.integers(0, 2))
    return DSSP(lower, lower + draw(st.integers(0, 5)), draw(st.booleans()))


bounded_delays = st.builds(BoundedDelay, st.one_of(st.integers(1, 9), st.just("auto"), st.none()))  # a gate like ASP's
paradigms = st.one_of(
    st.builds(BSP), st.builds(ASP), st.builds(SSP, st.integers(0, 4)), dssps(), dssps(), st.builds(DSSP), bounded_delays
)

# Times are multiples of 1/32, and so exact in both: many are equal or whole, which makes predictions tie.
pauses = st.sampled_from([0.0, 0.0, 0.125, 0.5, 1.0, 1.0, 1.0, 2.0, 3.375])
raw_events = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 1, 1, 2, 3]), st.integers(0, 19).map(lambda i: i == 0), pauses),
    min_size=20,
    max_size=60,
)


@st.composite
def periodic_events(draw: st.DrawFn) -> list[RawEvent]:
    """Workers with a period each, one of them slow, which is what DSSP's controller is made for; a few leave."""
    periods = [draw(st.integers(16, 40)), *draw(st.lists(st.integers(4, 16), min_size=1, max_size=3))]
    unsteady = draw(st.lists(st.sampled_from([1, 1, 1, 1, 0.5, 1.5, 2]), min_size=80, max_size=80))
    leaving = draw(st.sets(st.integers(0, 79), max_size=2))
    times = [
        (time, worker)
        for worker, period in enumerate(periods)
        for time in itertools.accumulate(factor * period for factor in unsteady[worker:])
    ]
    times = sorted(times)[:80]
    return [
        (worker, i in leaving, (time - before) / 16)
        for i, ((before, _), (time, worker)) in enumerate(itertools.pairwise([(0.0, 0), *times]))
    ]


@settings(moderate, max_examples=300)
@given(paradigms, st.one_of(raw_events, periodic_events()))
def test_decisions_equal_the_reference(paradigm: Paradigm, raw: list[RawEvent]) -> None:
    reference = table_of(paradigm)

    def happen(event: Event) -> list[int]:
        released = apply_event(paradigm, event)
        assert released == reference.happen(*event), event
        assert dict(paradigm.clocks) == reference.clocks(), event
        return released

    play(raw, happen)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("enforce_upper", [True, False])
def test_dssp_with_grants_equals_the_reference(seed: int, enforce_upper: bool) -> None:
    generator = random.Random(seed)
    periods = {0: 1.0, 1: generator.choice([2.25, 3.5]), 2: generator.choice([1.0, 1.5])}
    lower, upper = generator.choice([(0, 3), (1, 4), (2, 8)])
    run = simulate(DSSP(lower, upper, enforce_upper), periods, 35.0)
    reference, paradigm = Table(lower, upper, enforce_upper), DSSP(lower, upper, enforce_upper)
    assert [reference.happen(*event) for event in run.events] == [apply_event(paradigm, event) for event in run.events]
    assert max(run.leads) > lower, "no credit was handed out: this trace tests nothing"


# --- what always holds --------------------------------------------------------------------------------------------


@moderate
@given(paradigms, st.one_of(raw_events, periodic_events()))
def test_no_worker_is_released_above_the_bound(paradigm: Paradigm, raw: list[RawEvent]) -> None:
    bound = {BSP: 0, ASP: math.inf, BoundedDelay: math.inf}.get(type(paradigm))
    if isinstance(paradigm, SSP):
        bound = paradigm.threshold
    elif isinstance(paradigm, DSSP):
        bound = paradigm.upper if paradigm.enforce_upper else math.inf

    def happen(event: Event) -> list[int]:
        released = apply_event(paradigm, event)
        assert all(paradigm.lead(worker) <= bound for worker in released)
        return released

    play(raw, happen)


@moderate
@given(paradigms, st.one_of(raw_events, periodic_events()))
def test_nobody_waits_for_ever(paradigm: Paradigm, raw: list[RawEvent]) -> None:
    waiting: set[int] = set()

    def happen(event: Event) -> list[int]:
        released = apply_event(paradigm, event)
        name, worker, _ = event
        if name == "push":
            waiting.add(worker)
        waiting.discard(worker if name == "leave" else -1)
        assert set(released) <= waiting, "released without waiting"
        assert len(released) == len(set(released))
        waiting.difference_update(released)
        assert not waiting or set(paradigm.clocks) - waiting, "all present workers wait"
        return released

    trace = play(raw, happen)
    now = trace[-1][0][2] if trace else 0.0
    for _ in range(200):  # those who do not wait go on: everybody comes out
        if not waiting:
            break
        happen(("push", min(set(paradigm.clocks) - waiting, key=lambda p: paradigm.clocks[p]), now))
    assert not waiting


@moderate
@given(st.one_of(st.builds(ASP), bounded_delays), raw_events)
def test_asp_and_bounded_delay_release_every_pusher_at_once_and_nobody_else(
    paradigm: Paradigm, raw: list[RawEvent]
) -> None:
    for (name, worker, _), released in play(raw, lambda event: apply_event(paradigm, event)):
        assert released == ([worker] if name == "push" else [])


@moderate
@given(st.integers(0, 4), st.booleans(), st.one_of(raw_events, periodic_events()))
def test_dssp_without_room_is_ssp(lower: int, enforce_upper: bool, raw: list[RawEvent]) -> None:
    dssp, ssp = DSSP(lower, lower, enforce_upper), SSP(lower)
    for event, released in play(raw, lambda event: apply_event(dssp, event)):
        assert apply_event(ssp, event) == released


@moderate
@given(raw_events)
def test_bsp_decides_as_ssp_0(raw: list[RawEvent]) -> None:
    bsp, ssp = BSP(), SSP(0)
    for event, released in play(raw, lambda event: apply_event(bsp, event)):
        assert apply_event(ssp, event) == released


def test_only_bsp_averages() -> None:
    assert {name for name, paradigm in PARADIGMS.items() if paradigm.averages} == {"bsp"}


eighths = st.integers(0, 80).map(lambda n: n / 8)


@settings(max_examples=300)
@given(r_max=st.integers(0, 8), fast=eighths, slow=eighths, slow_starts=eighths, idle=eighths)
@example(r_max=2, fast=2.0, slow=3.0, slow_starts=0.0, idle=0.0)  # a tie between i = 0 and i = 1
@example(r_max=4, fast=0.0, slow=3.0, slow_starts=0.0, idle=0.0)  # all i are equal
def test_controller_equals_brute_force(r_max: int, fast: float, slow: float, slow_starts: float, idle: float) -> None:
    paradigm = DSSP(lower=5, upper=5 + r_max)  # so low that all pushes below pass, and intervals are plain differences
    paradigm.join(0, 0.0)
    paradigm.join(1, slow_starts)
    for n in (1, 2):
        assert paradigm.push(1, slow_starts + n * slow) == [1]
    last_push_slow, now = slow_starts + 2 * slow, slow_starts + 2 * slow + idle
    for n in (-2, -1, 0):
        assert paradigm.push(0, now + n * fast) == [0]
    expected = best_grant(r_max, *map(Fraction, (now, fast, last_push_slow, slow)))
    assert paradigm.controller(0, now) == expected


def test_controller_takes_the_slowest_whose_push_is_oldest() -> None:
    paradigm = DSSP(lower=5, upper=11)
    for worker in (0, 1, 2):
        paradigm.join(worker, 0.0)
    for time, worker in ((1.0, 1), (2.0, 2), (3.0, 2), (5.0, 1), (5.5, 0), (6.0, 0), (7.0, 0), (8.0, 0)):
        paradigm.push(worker, time)
    # worker 2 (3 + 1, 3 + 2, ... = 8 at i = 0), not worker 1 (5 + 4 = 9 at i = 1)
    assert paradigm.controller(0, 8.0) == 0
    paradigm.push(1, 8.0)
    paradigm.push(2, 8.5)  # I_1 = 3, I_2 = 5.5: now 1 is the older one, 11 at i = 3
    assert paradigm.controller(0, 8.0) == 3


# --- thresholds that change ---------------------------------------------------------------------------------------

# "set threshold=2 -> 0 1": who is released by it
CHANGES: dict[str, tuple[Paradigm, str]] = {
    "ssp: a rising threshold releases at once, the oldest first, and only who is within it": (
        SSP(0),
        """
        join 0; join 1; join 2; push 2 ->; push 1 ->; set threshold=1 -> 2 1
        push 1 ->; push 2 ->; set threshold=2 -> 1 2; push 2 ->; push 1 ->; push 0 -> 0 2 1
        """,
    ),
    "ssp: some of those who wait are still too far ahead": (
        SSP(2),
        """
        join 0; join 1; join 2; push 0 -> 0; push 0 -> 0; push 0 ->
        set threshold=0 ->; push 1 ->; set threshold=1 -> 1; push 2 -> 2; push 1 -> 1; set threshold=2 -> 0
        """,
    ),
    "ssp: who is ahead of a falling threshold waits after its next push, until it is within it": (
        SSP(3),
        """
        join 0; join 1; push 0 -> 0; push 0 -> 0; push 0 -> 0; set threshold=1 ->
        push 0 ->; push 1 -> 1; push 1 -> 1; push 1 -> 1 0; push 0 ->; push 1 -> 1 0
        """,
    ),
    "ssp: it may leave while it waits": (
        SSP(2),
        """
        join 0; join 1; push 0 -> 0; push 0 -> 0; set threshold=0 ->
        push 0 ->; push 1 -> 1; leave 1 -> 0; push 0 -> 0
        """,
    ),
    "ssp: nobody is here yet": (SSP(1), "set threshold=0 ->; join 0; join 1; push 0 ->; push 1 -> 1 0"),
    "dssp: lower rises": (
        DSSP(0, 3),
        "join 0; join 1; push 0 ->; set upper=5 ->; set lower=1 -> 0; push 0 ->; set lower=4 upper=4 -> 0; push 0 -> 0",
    ),
    # as in TABLES: at 7 a grant of two with lead 2, i.e. one more OK, with lead 3
    "dssp: where upper falls, credit is cut to what it leaves": (
        DSSP(lower=1, upper=3),
        f"{TWO_SLOW_PUSHES}; push 0 -> 0 @ 7; set upper=2 -> @ 7.5; push 0 -> @ 8; push 1 -> 1 @ 9; push 1 -> 1 0 @ 12",
    ),
    "dssp: credit that upper still leaves stays": (
        DSSP(lower=1, upper=4),
        f"{TWO_SLOW_PUSHES}; push 0 -> 0 @ 7; set upper=3 -> @ 7.5; push 0 -> 0 @ 8; push 0 -> @ 8.5",
    ),
    "dssp: where upper rises, credit does not": (
        DSSP(lower=1, upper=3),
        f"{TWO_SLOW_PUSHES}; push 0 -> 0 @ 7; set upper=9 -> @ 7.5; push 0 -> 0 @ 8; push 0 -> @ 9",
    ),
    "dssp as printed: credit stays, since upper bounds nothing": (
        DSSP(lower=1, upper=3, enforce_upper=False),
        f"{TWO_SLOW_PUSHES}; push 0 -> 0 @ 7; set upper=1 -> @ 7.5; push 0 -> 0 @ 8; push 0 -> 0 @ 9; push 0 -> @ 10",
    ),
    # from its OK at 8, worker 0 has I = 2 at 10: 10, 12 reach the 12 of worker 1 at i = 1, and at 12 i = 0 does
    "dssp: processing time runs from the OK that comes with a change": (
        DSSP(lower=0, upper=0),
        """
        join 0 @ 0; join 1 @ 0; push 0 -> @ 1; push 1 -> 1 0 @ 3; push 0 -> @ 4; push 1 -> 1 0 @ 6; push 0 -> @ 7
        set lower=1 upper=6 -> 0 @ 8; push 0 -> 0 @ 10; push 0 -> @ 12
        """,
    ),
}


def happen_or_set(paradigm: Paradigm, name: str, argument: Any, time: float) -> list[int]:
    if name == "set":
        return paradigm.set_thresholds(time, **argument)
    return apply_event(paradigm, (name, argument, time))


@pytest.mark.parametrize("name", CHANGES)
def test_tables_of_changes(name: str) -> None:
    paradigm, table = CHANGES[name]
    paradigm = copy.deepcopy(paradigm)
    expected, seen = [], []
    for line in filter(str.strip, table.replace("\n", ";").split(";")):
        text, _, time = line.partition("@")
        event, _, released = text.partition("->")
        kind, *words = event.split()
        values = {key: int(value) for key, value in (word.split("=") for word in words)} if kind == "set" else None
        argument = int(words[0]) if values is None else values
        expected.append((line, [int(p) for p in released.split()]))
        seen.append((line, happen_or_set(paradigm, kind, argument, float(time or len(seen)))))
    assert seen == expected


@st.composite
def changing(draw: st.DrawFn) -> tuple[Paradigm, dict[int, dict[str, int]]]:
    """An SSP or bounded DSSP, and new thresholds before some of the events of a trace."""
    ssp = draw(st.booleans())
    thresholds = (
        st.builds(lambda t: {"threshold": t}, st.integers(0, 5))
        if ssp
        else st.builds(lambda low, room: {"lower": low, "upper": low + room}, st.integers(0, 3), st.integers(0, 5))
    )
    first = draw(thresholds)
    changes = draw(st.dictionaries(st.integers(0, 60), thresholds, min_size=1, max_size=6))
    return (SSP(**first) if ssp else DSSP(**first)), changes


@settings(moderate, max_examples=300)
@given(changing(), st.one_of(raw_events, periodic_events()))
def test_with_changing_thresholds_no_ok_is_above_the_bound_in_force_and_nobody_waits_for_ever(
    setting: tuple[Paradigm, dict[int, dict[str, int]]], raw: list[RawEvent]
) -> None:
    paradigm, changes = setting
    waiting: list[int] = []  # oldest first
    count = itertools.count()

    def check(released: list[int]) -> None:
        bound = max(paradigm.thresholds.values())
        assert all(paradigm.lead(worker) <= bound for worker in released)
        assert [worker for worker in waiting if worker in released] == [w for w in released if w in waiting]
        waiting[:] = [worker for worker in waiting if worker not in released]
        assert not waiting or set(paradigm.clocks) - set(waiting), "all present workers wait"

    def happen(event: Event) -> list[int]:
        change = changes.get(next(count))
        if change is not None:
            lowest = min(change.values())
            expected = [worker for worker in waiting if paradigm.lead(worker) <= lowest]
            released = paradigm.set_thresholds(event[2], **change)
            assert released == expected, "those within the bound of all, oldest first, and nobody else"
            assert paradigm.thresholds == change
            check(released)
        name, worker, _ = event
        if name == "push" and worker in waiting:
            return []  # it waits: it cannot push
        released = apply_event(paradigm, event)
        if name == "leave" and worker in waiting:
            waiting.remove(worker)
        check(released)
        if name == "push" and worker not in released:
            waiting.append(worker)
        return released

    trace = play(raw, happen)
    now = trace[-1][0][2] if trace else 0.0
    for _ in range(300):  # those who do not wait go on: everybody comes out
        if not waiting:
            break
        happen(("push", min(set(paradigm.clocks) - set(waiting), key=lambda p: paradigm.clocks[p]), now))
    assert not waiting


@moderate
@given(changing(), st.one_of(raw_events, periodic_events()))
def test_changes_go_on_from_a_state_under_thresholds_from_elsewhere(
    setting: tuple[Paradigm, dict[int, dict[str, int]]], raw: list[RawEvent]
) -> None:
    """Thresholds are no part of the state: one made with the new ones, given the state, is where a change leads."""
    paradigm, changes = setting
    play(raw, lambda event: apply_event(paradigm, event))
    for change in changes.values():
        paradigm.set_thresholds(100.0, **change)
        other = type(paradigm)(**change)
        other.load_state_dict(paradigm.state_dict())
        assert repr(other) == repr(paradigm)
        assert other.state_dict() == paradigm.state_dict()


@pytest.mark.parametrize(
    ("paradigm", "thresholds", "text"),
    [
        *((SSP(2), {"threshold": v}, f"SSP(threshold={v!r}): threshold counts") for v in (-1, True, 1.5, "3", None)),
        *((DSSP(1, 3), {"upper": v}, f"DSSP(upper={v!r}): upper counts") for v in (-1, False, 2.0)),
        (DSSP(1, 3), {"lower": 4}, "DSSP(lower=4, upper=3): lower must not exceed upper"),
        (DSSP(1, 3), {"upper": 0}, "DSSP(lower=1, upper=0): lower must not exceed upper"),
        (DSSP(1, 3), {"threshold": 2}, "set_thresholds(threshold=2): DSSP has lower and upper, e.g. set_thresholds(lo"),
        (SSP(2), {"threshold": 1, "upper": 2}, "SSP has threshold, e.g. set_thresholds(threshold=2)"),
        (SSP(2), {}, "set_thresholds(): SSP has threshold"),
        (BSP(), {"threshold": 2}, "BSP has no threshold to change: use ssp or dssp, or bounded-delay, e.g."),
        (ASP(), {"delay": 2}, "ASP has no threshold to change: use ssp or dssp, or bounded-delay, e.g."),
        (
            BoundedDelay(4),
            {"threshold": 2},
            "set_thresholds(threshold=2): BoundedDelay has delay, e.g. set_thresholds(",
        ),
    ],
    ids=repr,
)
def test_impossible_changes_are_refused_with_the_value(
    paradigm: Paradigm, thresholds: dict[str, Any], text: str
) -> None:
    paradigm = copy.deepcopy(paradigm)
    paradigm.join(0, 0.0)
    before, thresholds_before = paradigm.state_dict(), paradigm.thresholds
    with pytest.raises(ValueError, match=re.escape(text)):
        paradigm.set_thresholds(1.0, **thresholds)
    assert (paradigm.state_dict(), paradigm.thresholds) == (before, thresholds_before)


# --- speed: the figures of design/algorithms.md -------------------------------------------------------------------

LASTING = {0: 1.0, 1: 2.3}


@pytest.mark.parametrize(
    ("paradigm", "updates", "largest_lead"),
    [
        (ASP(), 2869, 1131),
        (DSSP(3, 15, enforce_upper=False), 2869, 1131),
        (DSSP(3, 15), 1748, 15),
        (SSP(3), 1742, 3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("seed", range(3))
def test_lasting_speed_difference(paradigm: Paradigm, updates: int, largest_lead: int, seed: int) -> None:
    run = simulate(copy.deepcopy(paradigm), LASTING, seconds=2000.0, jitter=0.02, seed=seed)
    assert run.updates == pytest.approx(updates, abs=6)
    assert max(run.leads) == pytest.approx(largest_lead, abs=2 if largest_lead > 15 else 0)


def test_printed_dssp_never_waits_under_a_lasting_difference() -> None:
    """Once both have pushed twice: the reason for ``enforce_upper``."""
    printed = simulate(DSSP(3, 15, enforce_upper=False), LASTING, seconds=500.0, jitter=0.02)
    enforced = simulate(DSSP(3, 15), LASTING, seconds=500.0, jitter=0.02)
    assert printed.largest_wait == 0.0
    assert enforced.largest_wait > 1.0


# --- state --------------------------------------------------------------------------------------------------------


def through_msgpack(state: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(state), strict_map_key=False)


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ROUND_TRIPS: list[Callable[[Any], Any]] = [
    carried,
    through_msgpack,
    through_torch,
]


@pytest.mark.parametrize("carry", ROUND_TRIPS, ids=["parcel", "msgpack", "torch.save"])
@settings(max_examples=40)
@given(paradigm=paradigms, raw=st.one_of(raw_events, periodic_events()), at=st.integers(0, 79))
def test_state_continues_identically(
    carry: Callable[[Any], Any], paradigm: Paradigm, raw: list[RawEvent], at: int
) -> None:
    fresh = copy.deepcopy(paradigm)
    trace = play(raw, lambda event: apply_event(paradigm, event))
    first = copy.deepcopy(fresh)
    for event, released in trace[:at]:
        assert apply_event(first, event) == released
    state = first.state_dict()
    frozen = copy.deepcopy(state)
    second = copy.deepcopy(fresh)
    second.load_state_dict(carry(state))
    assert second.state_dict() == frozen
    for event, released in trace[at:]:
        assert apply_event(first, event) == released
        assert apply_event(second, event) == released
    assert second.state_dict() == first.state_dict() == paradigm.state_dict()
    assert state == frozen, "the state shares memory with the paradigm it was taken from"


# --- bad arguments and calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, True, False, 1.5, 3.0, "3", None, math.nan])
@pytest.mark.parametrize(("cls", "name"), [(SSP, "threshold"), (DSSP, "lower"), (DSSP, "upper")])
def test_a_threshold_is_a_count_of_clocks(cls: type[Paradigm], name: str, value: object) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 0") as error:
        cls(**{name: value})
    assert f"{cls.__name__}({name}={value!r})" in str(error.value)
    assert f"e.g. {cls.__name__}({name}=3)" in str(error.value)


def test_lower_must_not_exceed_upper() -> None:
    with pytest.raises(ValueError, match="lower must not exceed upper") as error:
        DSSP(lower=5, upper=2)
    assert "DSSP(lower=5, upper=2)" in str(error.value)
    assert "did you mean DSSP(lower=2, upper=5)" in str(error.value)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_enforce_upper_is_a_flag(value: object) -> None:
    with pytest.raises(ValueError, match="write True or False") as error:
        DSSP(enforce_upper=value)  # type: ignore[arg-type]
    assert f"enforce_upper={value!r}" in str(error.value)


NAMES = "'bsp', 'asp', 'ssp', 'dssp', 'bounded-delay'"


@pytest.mark.parametrize("name", PARADIGMS)
def test_as_paradigm_makes_one_of_a_name(name: str) -> None:
    assert type(as_paradigm(name)) is PARADIGMS[name]
    assert type(as_paradigm(name.upper())) is PARADIGMS[name]
    assert as_paradigm(name) is not as_paradigm(name)


def test_as_paradigm_returns_a_paradigm_itself() -> None:
    paradigm = SSP(7)
    assert as_paradigm(paradigm) is paradigm


def test_as_paradigm_names_the_unknown_name_and_the_known_ones() -> None:
    with pytest.raises(ValueError, match=rf"paradigm='sssp' is unknown: write one of {NAMES}, or a Paradigm"):
        as_paradigm("sssp")


def test_as_paradigm_asks_for_an_instance() -> None:
    with pytest.raises(TypeError, match=r"paradigm=SSP is a class: write SSP\(\)"):
        as_paradigm(SSP)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3, object, {"ssp": 3}])
def test_as_paradigm_refuses_anything_else(value: object) -> None:
    with pytest.raises(TypeError, match=rf"write one of {NAMES}, or a Paradigm") as error:
        as_paradigm(value)  # type: ignore[arg-type]
    assert f"paradigm={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("paradigm", "text"),
    [
        (BSP(), "BSP()"),
        (ASP(), "ASP()"),
        (SSP(2), "SSP(threshold=2)"),
        (DSSP(1, 2, False), "DSSP(lower=1, upper=2, enforce_upper=False)"),
        (BoundedDelay(), "BoundedDelay(delay=None)"),
        (BoundedDelay(3), "BoundedDelay(delay=3)"),
    ],
)
def test_repr_says_how_to_make_it(paradigm: Paradigm, text: str) -> None:
    assert repr(paradigm) == text
    assert repr(eval(text)) == text


@pytest.mark.parametrize(
    "paradigm", [BSP(), ASP(), SSP(0), DSSP(0, 4), BoundedDelay(2), BoundedDelay("auto")], ids=repr
)
class TestImpossibleCalls:
    @pytest.fixture(autouse=True)
    def _fresh(self, paradigm: Paradigm) -> None:
        self.paradigm = copy.deepcopy(paradigm)
        for worker in (0, 1):
            self.paradigm.join(worker, 0.0)

    def refused(self, event: Event, text: str) -> None:
        before = self.paradigm.state_dict()
        with pytest.raises(ValueError, match=text):
            apply_event(self.paradigm, event)
        assert self.paradigm.state_dict() == before, "the refused call has changed the state"

    def test_push_without_join(self) -> None:
        self.refused(("push", 2, 1.0), r"worker 2 pushed without having joined; present: \[0, 1\]")

    def test_leave_without_join(self) -> None:
        self.refused(("leave", 2, 1.0), r"worker 2 left without having joined; present: \[0, 1\]")

    def test_join_twice(self) -> None:
        self.refused(("join", 1, 1.0), "worker 1 joined twice")

    def test_push_after_leave(self) -> None:
        self.paradigm.leave(1, 1.0)
        self.refused(("push", 1, 2.0), "worker 1 pushed without having joined")


@pytest.mark.parametrize("paradigm", [BSP(), SSP(0), DSSP(0, 4)], ids=repr)
def test_push_while_waiting(paradigm: Paradigm) -> None:
    paradigm = copy.deepcopy(paradigm)
    paradigm.join(0, 0.0)
    paradigm.join(1, 0.0)
    assert paradigm.push(1, 1.0) == []
    before = paradigm.state_dict()
    with pytest.raises(ValueError, match="worker 1 pushed while it waits for the OK of its last push"):
        paradigm.push(1, 2.0)
    assert paradigm.state_dict() == before, "the refused call has changed the state"


# --- no torch -----------------------------------------------------------------------------------------------------


def test_paradigms_import_without_torch() -> None:
    code = "import sys, lightning_stale.paradigms; print(sorted({'torch', 'lightning', 'zmq'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-X", "lightning_stale_server", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
