"""What a push costs does not grow with the number of workers, and what it leads to is what a scan of all would say."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stale.coordinator.leases import EpochLeases, Plan
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm
from lightning_stale.paradigms.clocks import Clocks
from tests.unit.scanning import ScanningLeases, scanning

PARADIGMS: list[Callable[[random.Random], Paradigm]] = [
    lambda generator: BSP(),
    lambda generator: ASP(),
    lambda generator: SSP(generator.randrange(5)),
    lambda generator: DSSP(low := generator.randrange(4), low + generator.randrange(9), generator.random() < 0.6),
    lambda generator: BoundedDelay("auto", waiting=generator.choice([0.02, 0.1])),
]
EVENTS = 250


def outcome(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return call(*arguments, **named)
    except ValueError as error:
        return str(error)


def everything(paradigm: Any, now: float) -> Any:
    clocks = list(paradigm.clocks.items())
    grants = [paradigm.controller(worker, now) for worker in paradigm.clocks] if hasattr(paradigm, "controller") else []
    state = paradigm.state_dict()
    orders = [list(value) for value in state.values() if isinstance(value, dict)]
    leads = [paradigm.lead(worker) for worker in paradigm.clocks]
    return clocks, leads, state, orders, grants, getattr(paradigm, "delay", None)


@pytest.mark.parametrize("make", PARADIGMS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_decides_what_a_scan_of_all_would(make: Callable[[random.Random], Paradigm], seed: int) -> None:
    """Equal and unequal workers, impossible calls, new thresholds, and states that are loaded under others."""
    generator = random.Random(seed)
    fast = make(generator)
    slow, fresh = scanning(fast), copy.deepcopy(fast)
    workers = generator.randint(1, 9)
    weights = [generator.choice([1, 1, 3, 20]) for _ in range(workers)]
    steady = generator.random() < 0.5
    now = 0.0
    for _ in range(EVENTS):
        now += generator.choice([0.0, 0.0, 0.125, 0.5, 1.0, 3.375, -0.25])
        worker = generator.choices(range(workers), weights)[0]
        kind = generator.choices(
            ["push", "join", "leave", "set", "load", "grant"], [60, 6, 1 if steady else 5, 2, 1, 20]
        )[0]
        if kind == "push" and worker not in fast.clocks and generator.random() < 0.9:
            kind = "join"
        if kind == "set" and fast.thresholds and not isinstance(fast, BoundedDelay):
            lower = generator.randrange(5)
            values = {"lower": lower, "upper": lower + generator.randrange(9)}
            values = values if isinstance(fast, DSSP) else {"threshold": lower}
            assert fast.set_thresholds(now, **values) == slow.set_thresholds(now, **values)
        elif kind == "load":
            state = slow.state_dict()
            if generator.random() < 0.7:  # into another, for SSP with another threshold
                fast = SSP(generator.randrange(5)) if isinstance(fast, SSP) else copy.deepcopy(fresh)
                slow = scanning(fast)
            fast.load_state_dict(copy.deepcopy(state))
            slow.load_state_dict(copy.deepcopy(state))
        elif kind == "grant" and isinstance(fast, BoundedDelay):
            for one in (fast, slow):
                one.note_grant(worker, now)
            now += generator.choice([1.0, 1.0, 1.25, 4.0])
            for one in (fast, slow):
                one.note_commit(worker, now)
        elif kind in ("push", "join", "leave"):
            assert outcome(getattr(fast, kind), worker, now) == outcome(getattr(slow, kind), worker, now)
        assert everything(fast, now) == everything(slow, now)


seen = Counter[str]()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def hand_out(seed: int) -> None:
    generator = random.Random(seed)
    workers = generator.randint(1, 6)
    bound = generator.choice([None, None, *range(1, 9)])
    allows = (lambda lease, oldest: lease - oldest < bound) if bound else (lambda lease, oldest: True)
    fast, slow = EpochLeases(workers, allows), ScanningLeases(workers, allows)
    each, prefetch = generator.randint(1, 3), generator.choice([0, 0, 1, 3, 8])
    steps = generator.randint(1, 8)
    batches = (steps - 1) * each * workers + generator.randint(workers, (each + 1) * workers)
    until = generator.randint(1, steps)
    plan = Plan(0, batches, each, steps, until, prefetch)
    members = list(range(workers + generator.choice([0, 0, 3])))
    weights = [generator.choice([1, 1, 3, 20]) for _ in members]
    for _ in range(EVENTS):
        member = generator.choices(members, weights)[0]
        action = generator.choices(["ask", "commit", "both", "take back", "open", "serve"], [20, 20, 40, 3, 3, 2])[0]
        both = (fast, slow)
        if action in ("commit", "both"):
            mine = fast.of(member)
            leases = mine[:1] if generator.random() < 0.95 else [generator.randrange(40)]
            assert len({str(outcome(one.commit, member, leases)) for one in both}) == 1
            seen["committed"] += bool(leases)
        if action in ("ask", "both"):
            told = {str(outcome(one.request, member)) for one in both}
            assert len(told) == 1
            seen["asked"] += 1
        elif action == "take back":
            assert fast.take_back(member) == slow.take_back(member)
        elif action == "serve":
            assert fast.serve() == slow.serve()
        elif action == "open":
            if fast.plan == plan and fast.committed == fast._end:
                if until < steps:
                    until = generator.randint(until + 1, steps)
                    plan = Plan(plan.epoch, batches, each, steps, until, prefetch)
                else:
                    until = generator.randint(1, steps)
                    plan = Plan(plan.epoch + 1, batches, each, steps, until, prefetch)
                    seen["epochs"] += 1
            here = generator.sample(members, generator.randint(0, len(members)))
            assert len({str(outcome(one.open, plan, here)) for one in both}) == 1
        for attribute in ("plan", "step", "left", "committed"):
            assert getattr(fast, attribute) == getattr(slow, attribute)
        assert list(fast.held.items()) == list(slow.held.items())
        assert [fast.waits_for_others(m) for m in members] == [slow.waits_for_others(m) for m in members]
        assert fast.state_dict() == slow.state_dict()
        assert list(fast._line) == slow._line


def test_hands_out_what_a_scan_of_all_would() -> None:
    seen.clear()
    hand_out()
    assert min(seen[what] for what in ("committed", "asked")) > 1000, seen
    assert seen["epochs"] > 20, seen


# --- the cost ---------------------------------------------------------------------------------------------------------


class Counting:
    """Counts the lines of the package that Python runs."""

    def __enter__(self) -> Counting:
        self.lines = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if "lightning_stale" not in frame.f_code.co_filename:
            return None
        self.lines += event == "line"
        return self._trace


def lines_per_push(paradigm: Paradigm, workers: int, rounds: int = 12) -> float:
    """Workers of equal speed, a tenth of them half as fast, in turn; each pushes when it may."""
    for worker in range(workers):
        paradigm.join(worker, 0.0)
    free = set(range(workers))
    pushes = 0
    with Counting() as counting:
        for turn in range(rounds):
            for worker in range(workers):
                if worker in free and (worker % 10 or turn % 2):
                    free.discard(worker)
                    free.update(paradigm.push(worker, turn + worker / workers))
                    pushes += 1
    return counting.lines / pushes


@pytest.mark.parametrize("make", [BSP, ASP, lambda: SSP(2), lambda: DSSP(1, 5), lambda: BoundedDelay(8)])
def test_a_push_takes_as_many_lines_of_code_with_more_workers(make: Callable[[], Paradigm]) -> None:
    few, many = lines_per_push(make(), 20), lines_per_push(make(), 2000)
    assert many < 1.25 * few, (few, many)


def test_a_batch_takes_as_many_lines_of_code_with_more_workers() -> None:
    def lines(workers: int) -> float:
        bound = 2 * workers
        leases = EpochLeases(workers, lambda lease, oldest: lease - oldest < bound)
        leases.open(Plan(0, 8 * workers, 1, 8, 8, prefetch=2), range(workers))
        held = dict(grant for worker in range(workers) for grant in leases.request(worker))
        with Counting() as counting:
            while held:
                for worker, grant in list(held.items()):
                    if grant.over:
                        del held[worker]
                    elif worker % 10 or grant.lease % 2 or len(held) < workers / 2:
                        del held[worker]
                        held.update(leases.commit(worker, [grant.lease]) + leases.request(worker))
        return counting.lines / (8 * workers)

    few, many = lines(20), lines(1000)
    assert many < 1.25 * few, (few, many)


def test_clocks_that_leave_gaps() -> None:
    clocks = Clocks()
    for worker in range(4):
        clocks.join(worker, 0)
        for _ in range(10**worker):
            clocks.advance(worker)
    assert (clocks.smallest, clocks.largest) == (1, 1000)
    clocks.leave(3)
    assert (clocks.smallest, clocks.largest) == (1, 100)
    clocks.leave(0)
    assert (clocks.smallest, clocks.largest, clocks.slowest) == (10, 100, {1})
