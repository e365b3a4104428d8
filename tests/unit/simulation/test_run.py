"""Simulated runs against simulations that have nothing in common with them, and against arithmetic."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_stale.simulation import Cluster, Outcome, Setting, StepTimes, draw, run, run_ddp
from tests.unit.on_demand import formula, step_times

PASSES = 20

# steps/s over BSP, and the largest staleness, of ../shared/data/traces/README.md
PUBLISHED = {
    "SE": {
        "ssp:1": (1.23, 55),
        "ssp:15": (1.23, 59),
        "asp": (1.23, 57),
        "asp@on-demand": (1.26, 57),
        "ssp:3@on-demand": (1.23, 53),
        "ssp:15@on-demand": (1.25, 59),
        "bounded-delay:32": (1.14, 50),
        "bounded-delay:48": (1.26, 55),
        "bounded-delay:64": (1.26, 57),
    },
    "AR": {
        "ssp:1": (1.00, 6),
        "ssp:15": (1.00, 9),
        "asp": (1.00, 9),
        "asp@on-demand": (1.94, 9),
        "ssp:3@on-demand": (1.00, 6),
        "ssp:15@on-demand": (1.01, 9),
        "bounded-delay:4": (1.75, 6),
        "bounded-delay:6": (1.87, 8),
        "bounded-delay:8": (1.94, 9),
    },
}


def job(name: str) -> StepTimes:
    return StepTimes(name, tuple(map(tuple, step_times(name))))


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in PUBLISHED for setting in PUBLISHED[name]])
def test_real_jobs_come_out_as_published(name: str, setting: str) -> None:
    times = job(name)
    ddp = run_ddp(times, steps=PASSES * times.steps)
    outcome = run(Setting.parse(setting), times, steps=PASSES * times.steps)
    assert (round(outcome.rate / ddp.rate, 2), outcome.max_staleness) == PUBLISHED[name][setting]
    assert outcome.batches == ddp.batches == PASSES * times.steps * times.workers


@pytest.mark.parametrize(("name", "limit"), [("SE", 1.26), ("AR", 1.94)])
def test_the_limit_of_real_jobs_is_as_published(name: str, limit: float) -> None:
    times = job(name)
    assert round(times.own_rates / run_ddp(times).rate, 2) == limit


# --- two simulations --------------------------------------------------------------------------------------------------

eighths = st.integers(1, 40).map(lambda n: n / 8)  # many end at the same time
worlds = st.integers(1, 4).flatmap(
    lambda steps: st.lists(st.lists(eighths, min_size=steps, max_size=steps).map(tuple), min_size=1, max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(world=worlds, steps=st.integers(1, 8), delay=st.integers(1, 12) | st.none())
def test_on_demand_equals_the_formula(world: list[tuple[float, ...]], steps: int, delay: int | None) -> None:
    times = StepTimes("", tuple(world))
    setting = Setting.parse("asp@on-demand" if delay is None else f"bounded-delay:{delay}")
    outcome = run(setting, times, steps=steps)
    expected = formula(world, steps * times.workers, math.inf if delay is None else delay)
    assert outcome.seconds == expected.makespan
    assert outcome.computing == pytest.approx(
        sum(lease.end - lease.begin for lease in expected.leases.values()) / expected.makespan / times.workers
    )
    if len(set(itertools.chain(*world))) == len(list(itertools.chain(*world))) and delay is None and steps == 1:
        assert sorted(outcome.staleness.elements()) == sorted(expected.staleness)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9999), workers=st.integers(1, 6), delay=st.integers(1, 20))
def test_staleness_on_demand_equals_the_formula(seed: int, workers: int, delay: int) -> None:
    """With times that never tie, every single one."""
    times = draw(workers, 1.0, factors=[2.3][: workers - 1], jitter=0.3, steps=7, seed=seed)
    outcome = run(Setting.parse(f"bounded-delay:{delay}"), times, steps=9)
    expected = formula(times.of, 9 * workers, delay)
    assert sorted(outcome.staleness.elements()) == sorted(expected.staleness)
    assert outcome.max_staleness <= (delay - 1) + (workers - 1)


def recursion(times: Sequence[Sequence[float]], steps: int, threshold: int) -> tuple[float, list[int]]:
    """SSP on shards: push ``k`` of a worker is let go when all have made ``k - threshold``.

    Returns when the last is let go, and the staleness of all pushes.
    """
    workers = range(len(times))
    pushed = [[0.0] * (steps + 1) for _ in workers]
    released = [[0.0] * (steps + 1) for _ in workers]
    for k in range(1, steps + 1):
        for p in workers:
            pushed[p][k] = released[p][k - 1] + times[p][(k - 1) % len(times[p])]
        for p in workers:
            gate = max(pushed[q][k - threshold] for q in workers) if k > threshold else 0.0
            released[p][k] = max(pushed[p][k], gate)
    all_pushes = [pushed[q][k] for q in workers for k in range(1, steps + 1)]
    staleness = [
        sum(released[p][k - 1] < push < pushed[p][k] for push in all_pushes)
        for p in workers
        for k in range(1, steps + 1)
    ]
    return max(each[steps] for each in released), staleness


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 9999), workers=st.integers(1, 5), threshold=st.integers(0, 6), steps=st.integers(1, 12))
@example(seed=0, workers=1, threshold=0, steps=1)
def test_ssp_on_shards_equals_a_recursion(seed: int, workers: int, threshold: int, steps: int) -> None:
    times = draw(workers, 1.0, factors=[2.3][: workers - 1], jitter=0.4, steps=5, seed=seed)
    outcome = run(Setting.parse(f"ssp:{threshold}"), times, steps=steps)
    seconds, staleness = recursion(times.of, steps, threshold)
    assert outcome.seconds == seconds
    assert outcome.mean_staleness * outcome.batches == pytest.approx(sum(staleness))
    assert (outcome.max_staleness, outcome.batches) == (max(staleness), steps * workers)


@given(worlds, st.integers(1, 9))
def test_bsp_is_ddp_where_nothing_costs_anything(world: list[tuple[float, ...]], steps: int) -> None:
    times = StepTimes("", tuple(world))
    bsp, ddp = run(Setting.parse("bsp"), times, steps=steps), run_ddp(times, steps=steps)
    assert bsp.seconds == pytest.approx(ddp.seconds)
    assert bsp.waiting == pytest.approx(ddp.waiting, abs=1e-9)
    assert bsp.staleness == ddp.staleness == {0: bsp.batches}


def test_epochs_begin_when_all_have_met() -> None:
    times = StepTimes("", ((1.0,), (3.0,)))
    assert run(Setting.parse("asp"), times, steps=4, epochs=3).seconds == 3 * 12.0
    assert run(Setting.parse("asp@on-demand"), times, steps=2, epochs=5).seconds == 5 * 3.0  # three and one
    assert run(Setting.parse("asp@on-demand"), times, steps=2, epochs=5).epoch_s == 3.0


# --- what an exchange costs -------------------------------------------------------------------------------------------

COSTLY = Cluster(model_bytes=250e6, exchange_s=0.5, link_gbit=8, server_gbit=16, update_s=0.25)  # 1/4 s, 1/8 s


@pytest.mark.parametrize("setting", ["asp", "ssp:0", "dssp:1:2", "asp@on-demand", "bounded-delay:1"])
def test_an_exchange_of_one_worker_takes_each_of_its_parts(setting: str) -> None:
    """The link of the worker and the server's, there and back, messages, and the update; nobody waits for others."""
    outcome = run(Setting.parse(setting), StepTimes("", ((2.0,),)), COSTLY, steps=10)
    each = 2.0 + 2 * 0.25 + 2 * 0.125 + 0.5 + 0.25
    first_pull = 0.25 + 0.125 + 0.25
    assert outcome.seconds == pytest.approx(first_pull + 10 * each)
    assert outcome.server_load == pytest.approx(2.5 / outcome.seconds)
    assert outcome.computing == pytest.approx(20.0 / outcome.seconds)


def test_a_server_that_is_too_slow_is_the_limit() -> None:
    outcome = run(Setting.parse("asp"), draw(8, 1.0, jitter=0.1, steps=50), Cluster(update_s=0.5), steps=200)
    assert outcome.rate == pytest.approx(2.0, rel=0.01)
    assert outcome.server_load == pytest.approx(1.0, abs=0.01)
    assert outcome.waiting == pytest.approx(1 - 2.0 / 8, abs=0.01)
    assert outcome.mean_staleness == pytest.approx(7.0, abs=0.1)


def test_a_servers_link_that_is_too_narrow_is_the_limit() -> None:
    narrow = Cluster(model_bytes=125e6, server_gbit=4)  # a quarter of a second
    outcome = run(Setting.parse("asp"), draw(8, 1.0, jitter=0.1, steps=50), narrow, steps=200)
    assert outcome.rate == pytest.approx(4.0, rel=0.01)
    assert outcome.server_load == pytest.approx(1.0, abs=0.01)


def test_a_round_is_one_step_after_all_have_been_added_up() -> None:
    outcome = run(Setting.parse("bsp"), StepTimes("", ((1.0,),) * 4), Cluster(update_s=0.125), steps=10)
    assert outcome.seconds == pytest.approx(10 * (1.0 + 4 * 0.125 + 0.125))
    assert outcome.staleness == {0: 40}


def test_ddp_pays_for_a_ring_or_what_is_said() -> None:
    times = StepTimes("", ((1.0,),) * 4)
    assert run_ddp(times, Cluster(model_bytes=1e9, link_gbit=8, exchange_s=0.5), steps=1).seconds == 1.0 + 0.5 + 1.5
    assert run_ddp(times, Cluster(model_bytes=1e9, link_gbit=8, all_reduce_s=0.25), steps=1).seconds == 1.25
    assert run_ddp(StepTimes("", ((1.0,),)), Cluster(model_bytes=1e9, link_gbit=8), steps=1).seconds == 1.0


# --- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["asp@on-demand", "ssp:2@on-demand", "dssp:1:4@on-demand", "bsp@on-demand"])
@pytest.mark.parametrize("back_after_s", [5.0, math.inf])
def test_on_demand_the_others_train_what_the_dead_have_not(setting: str, back_after_s: float) -> None:
    times = draw(5, 1.0, jitter=0.2, steps=40)
    often = Cluster(deaths_per_hour=60.0, back_after_s=back_after_s)
    outcome = run(Setting.parse(setting), times, often, steps=40, epochs=3, seed=2)
    assert outcome.batches == 3 * 40 * 5, "every batch is trained once"
    assert outcome.deaths >= 3
    assert run(Setting.parse(setting), times, often, steps=40, epochs=3, seed=2) == outcome
    assert run(Setting.parse(setting), times, often, steps=40, epochs=3, seed=3) != outcome
    assert outcome.seconds > run(Setting.parse(setting), times, steps=40, epochs=3).seconds


def test_a_bounded_delay_stays_bounded_when_workers_die() -> None:
    often = Cluster(deaths_per_hour=120.0, back_after_s=3.0)
    for seed in range(20):
        outcome = run(Setting.parse("bounded-delay:6"), draw(4, 1.0, jitter=0.5, seed=seed), often, steps=60, seed=seed)
        assert outcome.max_staleness <= 5 + 3
        assert outcome.deaths > 0


@pytest.mark.parametrize("checkpoint_s", [math.inf, 25.0])
def test_what_ends_at_a_death_takes_as_long_as_is_to_be_expected(checkpoint_s: float) -> None:
    """From one checkpoint to the next: ``(exp(rate * seconds) - 1) * (1 / rate + back)``."""
    cluster = Cluster(deaths_per_hour=36.0, back_after_s=7.0, checkpoint_s=checkpoint_s)
    rate = 2 * 36.0 / 3600
    parts = [100.0] if checkpoint_s == math.inf else [25.0] * 4
    expected = sum((math.exp(rate * part) - 1) * (1 / rate + 7.0) for part in parts)
    took = [cluster.with_restarts(100.0, workers=3, seed=seed) for seed in range(4000)]
    assert statistics.fmean(took) == pytest.approx(expected, rel=0.05)


def test_ddp_and_shards_begin_again_and_one_worker_does_not_die() -> None:
    often = Cluster(deaths_per_hour=30.0, back_after_s=60.0, checkpoint_s=10.0)
    times = StepTimes("", ((1.0,),) * 4)
    free = run_ddp(times, steps=500)
    ddp, asp = run_ddp(times, often, steps=500), run(Setting.parse("asp"), times, often, steps=500)
    assert ddp.seconds == asp.seconds > free.seconds
    assert ddp.efficiency == pytest.approx(free.seconds / ddp.seconds)
    alone = StepTimes("", ((1.0,),))
    assert run_ddp(alone, often, steps=5).seconds == 5.0


def test_what_makes_no_progress_is_refused() -> None:
    hopeless = Cluster(deaths_per_hour=3600.0, back_after_s=60.0, checkpoint_s=math.inf)
    with pytest.raises(ValueError, match=r"makes no progress\. Write fewer deaths or more checkpoints"):
        run_ddp(StepTimes("", ((1.0,),) * 8), hopeless, steps=1000)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_bytes", "exchange_s", "update_s", "deaths_per_hour", "server_gbit"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_cluster_has_no_negative_costs(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Cluster\({name}={value}\)"):
        Cluster(**{name: value})


@pytest.mark.parametrize("name", ["link_gbit", "server_gbit", "checkpoint_s"])
def test_a_bandwidth_is_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Cluster\({name}=0\): write a number above 0"):
        Cluster(**{name: 0})


@pytest.mark.parametrize(("steps", "epochs"), [(0, 1), (1, 0), (-3, 1)])
def test_there_is_at_least_a_step(steps: int, epochs: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}, epochs={epochs}: write at least one of each"):
        run(Setting.parse("asp"), StepTimes("", ((1.0,),)), steps=steps, epochs=epochs)


def test_an_outcome_says_what_came_out() -> None:
    outcome: Outcome = run(Setting.parse("asp"), StepTimes("", ((1.0,), (3.0,))), steps=4)
    assert outcome.row() == {
        "setting": "asp",
        "data": "shards",
        "epoch_s": 12.0,
        "batches_per_s": 8 / 12,
        "efficiency": 0.5,
        "waiting": pytest.approx(1 / 3),
        "staleness": {"mean": outcome.mean_staleness, "p99": outcome.quantile(0.99), "max": outcome.max_staleness},
        "server_load": 0.0,
        "deaths": 0,
    }
