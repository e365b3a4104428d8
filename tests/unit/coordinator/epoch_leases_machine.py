"""Workers that ask for batches, train them, are lost and come again, in any order, against :class:`EpochLeases` alone.

The model beside it knows nothing of numbers in a division: it has a list of what each lease of the epoch may be, says
where each batch is, and how much is kept for whom. It is run by ``test_leases.py``.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_stale.coordinator.leases import NONE_LEFT, EpochLeases, Grants, Plan

Choose = Callable[[Sequence[Any]], Any]
seen = Counter[str]()
"""How often each thing has happened, over all runs of this process."""


def a_plan(choose: Choose, workers: int, epoch: int = 0) -> Plan:
    """One that can be shared, perhaps with a remainder of more than a whole step."""
    each, steps = choose([1, 2, 3]), choose([1, 2, 3, 4])
    rest = choose(range(workers, (each + 1) * workers + 2))
    until, prefetch = choose(range(1, steps + 1)), choose([0, 0, 1, 3])
    return Plan(epoch, (steps - 1) * each * workers + rest, each, steps, until, prefetch)


def dealt(plan: Plan, workers: int) -> list[list[list[int]]]:
    """Return the leases of each step, by dealing the batches out one after the other."""
    pool = list(range(plan.batches))
    steps = []
    for _ in range(plan.steps - 1):
        steps.append([[pool.pop(0) for _ in range(plan.each)] for _ in range(workers)])
    size = 1
    while size < plan.each and (size + 1) * workers <= len(pool):
        size += 1
    last = []
    while pool:
        last.append(pool[:size])
        del pool[:size]
    return [*steps, last]


class EpochLeasesMachine(RuleBasedStateMachine):
    """One fit."""

    @initialize(seed=st.integers(0, 2**32), workers=st.integers(1, 4), bound=st.none() | st.integers(1, 8))
    def begin(self, seed: int, workers: int, bound: int | None) -> None:
        self.workers, self.bound = workers, bound
        self.leases = EpochLeases(workers, self.allows)
        self.state = dict.fromkeys(range(workers), "free")  # of who is here: or waiting, holding, over
        self.granted = 0
        self.holds: dict[int, tuple[int, list[int]]] = {}  # lease -> member, batches
        self.former: list[int] = []
        self.owed: set[int] = set()
        self.first_of_epoch(a_plan(random.Random(seed).choice, workers))

    def first_of_epoch(self, plan: Plan) -> None:
        self.division = dealt(plan, self.workers)
        self.committed: set[int] = set()
        self.leases_committed = 0
        self.until_before = 0
        self.shown = 0
        self.segment(plan)

    def segment(self, plan: Plan) -> None:
        """What holds from the first ``open`` on; that one is a worker's."""
        self.plan, self.is_open = plan, False
        self.free = [tuple(lease) for step in self.division[self.until_before : plan.until] for lease in step]
        self.of_segment = len(self.free)

    def allows(self, lease: int, oldest: int) -> bool:
        return self.bound is None or lease - oldest < self.bound

    # --- what the model says ----------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        return sum(map(len, self.division[: self.plan.until]))

    @property
    def bounded(self) -> bool:
        """Whether the bound forbids the next grant."""
        return self.bound is not None and any(lease <= self.granted - self.bound for lease in self.holds)

    def may_have(self, member: int) -> bool:
        """Whether something can be granted to ``member``, and is not kept for another."""
        return len(self.free) > (0 if member in self.owed else len(self.owed)) and not self.bounded

    def heard(self, grants: Grants) -> None:
        for member, grant in grants:
            assert self.state[member] == "waiting", f"{grant} for {member}, which has not asked"
            if grant.over:
                seen["over"] += 1
                assert (grant.first, grant.last) == (self.plan.batches, self.plan.batches)
                assert self.leases_committed == self.end, "told that none is left, and some are"
                assert grant.step == self.plan.until
                assert member not in self.owed or self.of_segment < self.members_at_open, f"{member} has had none"
                self.state[member] = "over"
                continue
            assert grant.lease == self.granted, "the numbers have a gap"
            batches = list(range(grant.first, grant.last))
            assert tuple(batches) in self.free, f"{batches} are not free"
            assert self.may_have(member)
            assert grant.step == self.step
            self.free.remove(tuple(batches))
            self.owed.discard(member)
            self.holds[grant.lease] = member, batches
            self.granted += 1
            self.state[member] = "holding"
            seen["granted"] += 1

    @property
    def step(self) -> int:
        whole = -(-self.leases_committed // self.workers)  # the one that has begun included
        return self.plan.until if self.leases_committed == self.end else min(whole, self.plan.until - 1)

    # --- what can happen --------------------------------------------------------------------------------------------

    def ask(self, member: int) -> None:
        self.leases.open(self.plan, set(self.state))
        if not self.is_open:
            self.is_open, self.owed, self.members_at_open = True, set(self.state), len(self.state)
        self.state[member] = "waiting"
        self.heard(self.leases.request(member))
        if self.state[member] == "waiting":
            seen["waits"] += 1

    def commit(self, member: int) -> None:
        [(lease, (_, batches))] = [item for item in self.holds.items() if item[1][0] == member]
        assert self.leases.stale(member, [lease]) is None
        del self.holds[lease]
        assert not self.committed & set(batches), "committed twice"
        self.committed |= set(batches)
        self.leases_committed += 1
        self.former.append(lease)
        self.state[member] = "free"
        self.heard(self.leases.commit(member, [lease]))

    def take_back(self, member: int, then: str | None = None) -> None:
        mine = {lease: batches for lease, (holder, batches) in self.holds.items() if holder == member}
        for lease, batches in mine.items():
            del self.holds[lease]
            self.free.append(tuple(batches))
            self.former.append(lease)
        self.owed.discard(member)
        del self.state[member]
        if then is not None:
            self.state[member] = then
        self.heard(self.leases.take_back(member))

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        self.act(lambda able: data.draw(st.sampled_from(able)))

    @rule(seed=st.integers(0, 2**32))
    def much_happens(self, seed: int) -> None:
        """Evenly chosen, which hypothesis would not do: some things need many others before them."""
        choice = random.Random(seed).choice
        for _ in range(20):
            self.act(choice)
            self.all_holds()

    def act(self, choose: Choose) -> None:
        self.choose = choose
        action = choose([action for action, times in self.actions().items() for _ in range(times)])
        seen[action] += 1
        getattr(self, action.replace(" ", "_"))()

    def actions(self) -> dict[str, int]:
        """Return what can happen now, and how likely it is."""
        states = Counter(self.state.values())
        all_done = self.is_open and self.leases_committed == self.end and self.state
        return {
            "a worker asks": 12 * (states["free"] > 0),
            "a worker commits": 12 * (states["holding"] > 0),
            "a worker asks twice": 2 * (states["waiting"] > 0),
            "a worker is lost": 3 * (len(self.state) > 0),
            "a worker begins nothing": 2 * (states["holding"] > 0),
            "a worker joins": 3 * (len(self.state) < 6),
            "the bound is raised": self.bound is not None,
            "what it does not hold is refused": len(self.state) > 0,
            "another plan is refused": self.is_open and self.leases_committed < self.end,
            "the rest is done": len(self.state) > 0,
            "all go on": 12 * bool(all_done),
        }

    def some(self, *states: str) -> int:
        member: int = self.choose([member for member, state in self.state.items() if state in states])
        return member

    def a_worker_asks(self) -> None:
        self.ask(self.some("free"))

    def a_worker_commits(self) -> None:
        member = self.some("holding")
        self.commit(member)
        if self.choose([True, False]):
            self.ask(member)

    def a_worker_asks_twice(self) -> None:
        member = self.some("waiting")
        with self.nothing_changes(), pytest.raises(ValueError, match=f"worker {member} asks for a batch while"):
            self.leases.request(member)

    def a_worker_is_lost(self) -> None:
        member = self.some("free", "waiting", "holding", "over")
        seen[f"lost when {self.state[member]}"] += 1
        self.take_back(member)

    def a_worker_begins_nothing(self) -> None:
        self.take_back(self.some("holding"), then="free")

    def a_worker_joins(self) -> None:
        """Perhaps one that was here before, and is owed nothing any more."""
        self.state[self.choose([member for member in range(7) if member not in self.state])] = "free"

    def the_bound_is_raised(self) -> None:
        assert self.bound is not None
        self.bound += self.choose(range(5))
        self.heard(self.leases.serve())

    def what_it_does_not_hold_is_refused(self) -> None:
        member = self.some("free", "waiting", "holding", "over")
        mine = [lease for lease, (holder, _) in self.holds.items() if holder == member]
        others = [lease for lease in self.holds if lease not in mine]
        stale = self.choose([*others, *self.former, *mine, NONE_LEFT, self.granted])
        leases = [*mine, stale]  # if it is its own, it names it twice
        with self.nothing_changes():
            assert self.leases.stale(member, leases) == stale
            with pytest.raises(ValueError, match=rf"worker {member} .* does not hold lease {stale} "):
                self.leases.commit(member, leases)
            assert self.leases.commit(member, []) == []

    def another_plan_is_refused(self) -> None:
        plan = a_plan(self.choose, self.workers, self.plan.epoch + self.choose([0, 1]))
        if plan != self.plan:
            with self.nothing_changes(), pytest.raises(ValueError, match="amid Plan"):
                self.leases.open(plan, set(self.state))

    def the_rest_is_done(self) -> None:
        """Whatever has happened, those who are here can do it."""
        for _ in range(2 * (self.end + len(self.state))):
            for member in [member for member, state in self.state.items() if state == "holding"]:
                self.commit(member)
            for member in [member for member, state in self.state.items() if state == "free"]:
                self.ask(member)
            self.nobody_waits_for_nothing()
        assert set(self.state.values()) == {"over"}
        assert self.leases_committed == self.end

    def all_go_on(self) -> None:
        """To the next meeting of the epoch, or to the next epoch; sometimes an epoch ends before its last step."""
        assert "waiting" not in self.state.values()
        self.state = dict.fromkeys(self.state, "free")
        if self.plan.until == self.plan.steps or self.choose(range(5)) == 0:
            seen["epochs"] += 1
            self.first_of_epoch(a_plan(self.choose, self.workers, self.plan.epoch + 1))
        else:
            seen["segments"] += 1
            self.until_before = self.plan.until
            until = self.choose(range(self.plan.until + 1, self.plan.steps + 1))
            self.segment(replace(self.plan, until=until))

    # --- what must hold ---------------------------------------------------------------------------------------------

    def nothing_changes(self) -> Any:
        return _Same(self.leases)

    @invariant()
    def all_holds(self) -> None:
        self.nobody_waits_for_nothing()
        if self.is_open:
            self.it_is_as_the_model_says()
            self.every_batch_is_in_one_place()
            self.progress_is_told()

    def it_is_as_the_model_says(self) -> None:
        assert self.leases.plan == self.plan
        assert self.leases.held.keys() == self.holds.keys()
        for member in self.state:
            assert self.leases.of(member) == [lease for lease, (holder, _) in self.holds.items() if holder == member]
        assert (self.leases.committed, self.leases.left) == (self.leases_committed, len(self.free))

    def every_batch_is_in_one_place(self) -> None:
        held = [batch for _, batches in self.holds.values() for batch in batches]
        free = [batch for batches in self.free for batch in batches]
        in_reach = [batch for step in self.division[: self.plan.until] for lease in step for batch in lease]
        assert sorted([*held, *free, *self.committed]) == in_reach
        state = self.leases.state_dict()
        assert [batch for first, last in state["committed"] for batch in range(first, last)] == sorted(self.committed)
        assert all(before[1] < after[0] for before, after in pairwise(state["committed"]))
        assert state["plan"] == vars(self.plan)

    def nobody_waits_for_nothing(self) -> None:
        for member, state in self.state.items():
            waits_for_others = state == "waiting" and len(self.free) <= (0 if member in self.owed else len(self.owed))
            assert self.leases.waits_for_others(member) == waits_for_others
            if state == "waiting":
                assert not self.may_have(member)
                not_asked = [other for other in self.owed if self.state[other] == "free"]
                assert self.holds or not_asked, "nobody can do anything"
                assert self.leases_committed < self.end, "nobody has told it that none is left"

    def progress_is_told(self) -> None:
        assert self.leases.step == self.step
        assert self.shown <= self.step <= self.plan.until
        assert (self.step == self.plan.until) == (self.leases_committed == self.end)
        self.shown = self.step

    def teardown(self) -> None:
        if self.state:
            self.the_rest_is_done()


class _Same:
    """Asserts that what is done with leases leaves them as they were."""

    def __init__(self, leases: EpochLeases) -> None:
        self._leases = leases

    def _all(self) -> dict[str, Any]:
        return {name: copy.deepcopy(value) for name, value in vars(self._leases).items() if name != "_allows"}

    def __enter__(self) -> None:
        self._before = self._all()

    def __exit__(self, *error: object) -> None:
        assert self._all() == self._before
