"""Ranks that average in rounds and are granted their batches, interleaved at random, without a process.

Whoever waits for ever is found out by the simulation; what was trained is a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_stale.averaging.merge import MERGES
from lightning_stale.averaging.rounds import Interval, Rounds
from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import Division, Grant, Plan
from lightning_stale.coordinator.round_leases import RoundLeases
from lightning_stale.strategies.updates.averaging import LeasesOfRounds
from tests.unit.averaging.simulation import SimulatedReducer, Simulation


class Run:
    """Ranks, and the coordinator whose answers they find in their mail."""

    def __init__(self, workers: int, steps: int, each: int, extra: int, every: int, prefetch: int, seed: int) -> None:
        self.workers, self.every = workers, every
        self.leases = RoundLeases(workers)
        self.coordinator = Coordinator(workers, leases=self.leases)
        self.plan = Plan(0, workers * steps * each + extra, each, steps, steps, prefetch)
        self.division = Division(self.plan, workers)
        self.mail: dict[int, m.Reply] = {}
        self.granted: dict[int, tuple[int, int]] = {}
        self.simulation = Simulation(workers, seed, [1.0, 20.0, 3.0, 1.0][:workers])
        for rank in range(workers):
            self.coordinator.handle(m.Join(rank, process=rank), 0.0)

    def tell(self, rank: int, message: m.Message) -> None:
        for reply in self.coordinator.handle(message, 0.0):
            assert isinstance(reply, (m.Granted, m.Met)), reply
            assert reply.member not in self.mail
            self.mail[reply.member] = reply
        self.simulation.pause(rank)

    def answer(self, rank: int) -> Any:
        self.simulation.pause(rank, until=lambda: rank in self.mail)
        return self.mail.pop(rank)


class Rank:
    """One of them, with one number per batch that its step lowers by one."""

    def __init__(self, run: Run, rank: int, interval: Interval, merge: str, reducer: SimulatedReducer) -> None:
        self.run, self.rank = run, rank
        self.replica = torch.zeros(run.plan.batches)
        self.rounds = Rounds([self.replica], reducer, run.workers, interval, MERGES[merge])
        self.leases = LeasesOfRounds()
        self.trained: list[int] = []
        self.batches_of: dict[int, range] = {}

    @property
    def averaged(self) -> Tensor:
        return self.rounds._tensors[0].weights.flat * -self.run.workers

    def request(self, mine: Sequence[int], plan: Plan | None) -> Grant:
        averaged = self.leases.note_step(mine)
        for lease in averaged:
            for batch in self.batches_of[lease]:
                assert round(float(self.averaged[batch])) == 1, "a lease is committed when its change is averaged"
        self.run.tell(self.rank, m.Request(self.rank, 1, averaged, plan, tuple(mine)))
        grant: Grant = self.run.answer(self.rank).grant
        self.batches_of[grant.lease] = range(grant.first, grant.last)
        return grant

    def meet(self, place: str, drains: bool = True) -> None:
        self.run.tell(self.rank, m.Arrive(self.rank, 1, place))
        if drains:
            self.rounds.flush()
        assert isinstance(self.run.answer(self.rank), m.Met)
        self.leases = LeasesOfRounds()

    def train(self) -> None:
        plan = self.run.plan
        self.meet("the start", drains=False)
        until = 0
        while until < plan.steps:
            until = min(until + self.run.every, plan.steps)
            end = self.run.division.end(until)
            grant = self.request((), Plan(0, plan.batches, plan.each, plan.steps, until, plan.prefetch))
            assert not grant.over, "everybody has a batch before each meeting"
            step = grant.step
            while not grant.over:
                assert step <= grant.step < until
                step = grant.step
                mine = range(grant.first, grant.last)
                self.trained += mine
                self.replica[list(mine)] -= 1
                grant = self.request((grant.lease,), None)
                if grant.over:
                    self.rounds.note_step()
                elif self.rounds.after_step():
                    self.leases.begin_round()
            assert grant.step == until
            self.meet(f"step {until}")
            self.meet("a collective", drains=False)
            assert self.run.leases.committed == end
            batches = self.run.division.batches(end - 1)[1]
            expected = torch.zeros(plan.batches)
            expected[:batches] = 1.0
            torch.testing.assert_close(self.replica * -self.run.workers, expected)


@pytest.mark.parametrize("merge", list(MERGES))
@settings(max_examples=40, deadline=None)
@given(
    workers=st.integers(1, 4),
    steps=st.integers(1, 8),
    each=st.integers(1, 3),
    extra=st.integers(0, 3),
    every=st.integers(1, 5),
    prefetch=st.integers(0, 3),
    interval=st.sampled_from(["auto", 1, 2, 5]),
    seed=st.integers(0, 2**20),
)
def test_every_batch_is_averaged_once_and_nobody_waits_for_ever(
    merge: str, workers: int, steps: int, each: int, extra: int, every: int, prefetch: int, interval: Any, seed: int
) -> None:
    run = Run(workers, steps, each, min(extra, workers - 1), every, prefetch, seed)
    ranks: dict[int, Rank] = {}

    def program(rank: int, reducer: SimulatedReducer) -> None:
        ranks[rank] = Rank(run, rank, interval, merge, reducer)
        ranks[rank].train()

    run.simulation.run(program)
    trained = sorted(batch for rank in ranks.values() for batch in rank.trained)
    assert trained == list(range(run.plan.batches))
    for rank in ranks.values():
        assert torch.equal(rank.replica, ranks[0].replica)
