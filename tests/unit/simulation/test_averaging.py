"""Simulated HPSGD against the package's own ``Rounds``, of which every rank runs one in virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_stale.averaging.merge import hpsgd
from lightning_stale.averaging.rounds import Reducer, Rounds
from lightning_stale.simulation import AveragingSetting, Cluster, Setting, StepTimes, draw, parse_setting, run, run_ddp
from tests.unit.averaging.simulation import Simulation


class EarliestFirst:
    """Gives the next turn to the rank whose time it is."""

    def __init__(self, world: World) -> None:
        self.world = world

    def choices(self, able: list[int], _: object) -> list[int]:
        return [min(able, key=lambda rank: (self.world.now[rank], rank))]


class World:
    """Ranks with ``Rounds`` that take as long for each step as they are told, and sums that take ``exchange_s``."""

    def __init__(self, times: StepTimes, interval: Any, exchange_s: float, on_demand: bool) -> None:
        self.times, self.interval, self.exchange_s, self.on_demand = times, interval, exchange_s, on_demand
        self.now = [0.0] * times.workers
        self.turns = Simulation(times.workers, seed=0)
        self.turns.random = EarliestFirst(self)  # type: ignore[assignment]
        self.counts: list[dict[int, Tensor]] = []  # of each sum: what each rank has brought
        self.ended: dict[int, float] = {}
        self.batches = 0

    def train(self, steps: int, epochs: int) -> None:
        self.turns.run(lambda rank, _: self._program(rank, steps, epochs))

    def sleep(self, rank: int, seconds: float) -> None:
        self.now[rank] += seconds
        self.turns.pause(rank)

    def _program(self, rank: int, steps: int, epochs: int) -> None:
        work = itertools.cycle(self.times.of[rank])
        reducer = TimedReducer(self, rank)
        rounds = Rounds([torch.zeros(1)], reducer, self.times.workers, self.interval, hpsgd)
        for epoch in range(1, epochs + 1):
            self.batches += 1
            for step in itertools.count(1):
                self.sleep(rank, next(work))
                if self.on_demand:  # it asks for the next before the round can end
                    if self.batches == epoch * steps * self.times.workers:
                        rounds.note_step()
                        break
                    self.batches += 1
                rounds.after_step()
                if not self.on_demand and step == steps:
                    break
            rounds.flush()

    def staleness(self) -> Counter[int]:
        found: Counter[int] = Counter()
        before, steps_before = True, 0
        for brought in self.counts:
            flushing, steps = sum(brought.values()).tolist()  # type: ignore[union-attr]
            found[0 if before else steps_before] += steps
            before, steps_before = flushing == self.times.workers, steps
        return +found


class TimedReducer(Reducer):
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.number = world, rank, -1

    def launch(self, tensors: Sequence[Tensor]) -> None:
        self.number += 1
        counts, world = self.world.counts, self.world
        if self.number == len(counts):
            counts.append({})
        self.tensors = list(tensors)
        counts[self.number][self.rank] = tensors[-1].clone()
        if len(counts[self.number]) == world.times.workers:
            world.ended[self.number] = world.now[self.rank] + world.exchange_s

    def done(self) -> bool:
        return self.world.ended.get(self.number, 1e9) <= self.world.now[self.rank]

    def wait(self) -> None:
        world = self.world
        world.turns.pause(self.rank, until=lambda: self.number in world.ended)
        world.now[self.rank] = max(world.now[self.rank], world.ended[self.number])
        world.turns.pause(self.rank)
        self.tensors[-1].copy_(sum(world.counts[self.number].values()))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    workers=st.integers(1, 4),
    interval=st.sampled_from(["auto", 1, 2, 5]),
    exchange_s=st.sampled_from([0.0, 0.3, 2.5]),
    on_demand=st.booleans(),
    steps=st.integers(1, 8),
    epochs=st.integers(1, 2),
)
def test_it_equals_rounds_in_virtual_time(
    seed: int, workers: int, interval: Any, exchange_s: float, on_demand: bool, steps: int, epochs: int
) -> None:
    times = draw(workers, 1.0, factors=[2.3][: workers - 1], jitter=0.3, steps=5, seed=seed)  # which never tie
    world = World(times, interval, exchange_s, on_demand)
    world.train(steps, epochs)
    setting = AveragingSetting("hpsgd", interval, "on-demand" if on_demand else "shards")
    outcome = run(setting, times, Cluster(all_reduce_s=exchange_s), steps=steps, epochs=epochs)
    assert outcome.seconds == pytest.approx(max(world.now))
    assert outcome.staleness == world.staleness()
    assert outcome.batches == outcome.staleness.total() == steps * epochs * workers


def test_an_exchange_that_is_shorter_than_a_step_costs_nothing_but_the_flush() -> None:
    times = StepTimes("", ((1.0,),) * 4)
    for interval in ("hpsgd", "hpsgd:1", "hpsgd:4"):
        outcome = run(parse_setting(interval), times, Cluster(all_reduce_s=0.5), steps=40)
        assert 40.0 < outcome.seconds <= 42.0
    assert run_ddp(times, Cluster(all_reduce_s=0.5), steps=40).seconds == 60.0


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_of_a_longer_one_an_interval_waits_for_the_rest(interval: int) -> None:
    outcome = run(
        parse_setting(f"hpsgd:{interval}"), StepTimes("", ((1.0,),) * 3), Cluster(all_reduce_s=8.0), steps=400
    )
    assert outcome.seconds == pytest.approx(400 / interval * 8.0, rel=0.02)
    assert outcome.waiting == pytest.approx(1 - interval / 8, abs=0.02)
    assert outcome.max_staleness == 3 * interval
    assert outcome.server_load is None


def test_a_round_costs_each_worker_an_update() -> None:
    """Of 40 rounds of one step: the first begins none, and after the last come those of the flush."""
    cluster = Cluster(all_reduce_s=0.5, update_s=0.25)
    outcome = run(parse_setting("hpsgd:1"), StepTimes("", ((1.0,),) * 4), cluster, steps=40)
    assert outcome.seconds == pytest.approx(40 + 39 * 0.25, abs=1.1)
    seldom = run(parse_setting("hpsgd:4"), StepTimes("", ((1.0,),) * 4), cluster, steps=40)
    assert seldom.seconds == pytest.approx(40 + 9 * 0.25, abs=1.1)


def test_on_demand_a_slow_worker_holds_nobody_up() -> None:
    times = StepTimes("", ((1.0,), (1.0,), (1.0,), (3.0,)))
    shards, on_demand = (run(parse_setting(f"hpsgd@{data}"), times, steps=300) for data in ("shards", "on-demand"))
    assert shards.seconds == pytest.approx(900.0, abs=3.0)
    assert on_demand.efficiency == pytest.approx(1.0, abs=0.01)


def test_a_death_ends_it_as_it_does_ddp() -> None:
    times = StepTimes("", ((1.0,),) * 4)
    often = Cluster(deaths_per_hour=30.0, checkpoint_s=10.0)
    assert run(parse_setting("hpsgd"), times, often, steps=500).seconds == pytest.approx(
        run_ddp(times, often, steps=500).seconds, rel=0.02
    )


@pytest.mark.parametrize(
    ("text", "interval", "data"),
    [("hpsgd", "auto", "shards"), ("HPSGD:auto@on-demand", "auto", "on-demand"), ("hpsgd:4@shards", 4, "shards")],
)
def test_settings_are_parsed(text: str, interval: Any, data: Any) -> None:
    assert parse_setting(text) == AveragingSetting(text, interval, data)


@pytest.mark.parametrize("text", ["hpsgd:0", "hpsgd:-1", "hpsgd:x", "hpsgd:1:2"])
def test_a_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"setting '{text}': write hpsgd, or with a number of steps a round"):
        parse_setting(text)


def test_a_setting_of_a_paradigm_is_parsed_as_before() -> None:
    setting = parse_setting("ssp:3")
    assert isinstance(setting, Setting)
    assert repr(setting.make()) == "SSP(threshold=3)"
