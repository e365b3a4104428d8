"""The callbacks that emulate unequal workers: seeded slow-downs."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_stale import StragglerInjection
from recipes.traces import real_job

# --- StragglerInjection -------------------------------------------------------------------------------------------


def draws(callback: StragglerInjection, rank: int, count: int = 200) -> list[float]:
    return [callback.delay_factor(rank) for _ in range(count)]


def test_by_default_nobody_is_slow() -> None:
    callback = StragglerInjection()
    assert {factor for rank in range(4) for factor in draws(callback, rank)} == {0.0}


def test_a_constant_factor_concerns_its_rank_only() -> None:
    callback = StragglerInjection(factors={1: 2.5})
    assert set(draws(callback, 0)) == {0.0}
    assert set(draws(callback, 1)) == {1.5}


def test_random_slow_downs_multiply_the_factor() -> None:
    callback = StragglerInjection(factors={1: 2.0}, probability=0.5, slowdown=3.0)
    assert set(draws(callback, 0)) == {0.0, 2.0}
    assert set(draws(callback, 1)) == {1.0, 5.0}


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_the_probability_is_that_of_a_slow_step(probability: float) -> None:
    slow = sum(factor > 0 for factor in draws(StragglerInjection(probability=probability, seed=5), 0, 4000)) / 4000
    assert math.isclose(slow, probability, abs_tol=0.03)


def test_the_sequence_of_a_rank_depends_on_seed_and_rank_only() -> None:
    first = StragglerInjection(probability=0.5, seed=7)
    alone = draws(StragglerInjection(probability=0.5, seed=7), 1)
    interleaved = []
    for _ in range(200):
        first.delay_factor(0)
        interleaved.append(first.delay_factor(1))
        first.delay_factor(2)
    assert interleaved == alone
    assert draws(StragglerInjection(probability=0.5, seed=7), 0) != alone
    assert draws(StragglerInjection(probability=0.5, seed=8), 1) != alone


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"factors": {2: 0.5}}, r"factors=\{2: 0.5\}: write how many times longer its steps take, >= 1"),
        ({"probability": 1.5}, r"probability=1.5: write a number from 0 to 1"),
        ({"probability": -0.1}, r"probability=-0.1: write a number from 0 to 1"),
        ({"probability": math.nan}, r"probability=nan: write a number from 0 to 1"),
        ({"slowdown": 0.9}, r"slowdown=0.9: it says how many times longer a slow step takes, >= 1"),
        ({"step_s": -1.0}, r"step_s=-1.0: write seconds >= 0"),
    ],
    ids=repr,
)
def test_bad_arguments_are_refused_with_the_value_and_the_cure(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        StragglerInjection(**arguments)


def test_factors_are_copied() -> None:
    factors = {0: 2.0}
    callback = StragglerInjection(factors=factors)
    factors[0] = 9.0
    assert callback.delay_factor(0) == 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only ``sleep`` and the test move."""
    clock = SimpleNamespace(now=100.0, slept=[])

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", sleep)
    return clock


def slow_step(callback: StragglerInjection, clock: SimpleNamespace, forwards: list[float], rank: int = 0) -> None:
    """One batch whose forward passes take ``forwards`` seconds, each with its backward."""
    trainer: Any = SimpleNamespace(global_rank=rank)
    module: Any = None
    callback.on_train_batch_start(trainer, module, batch=None, batch_idx=0)
    for forward_s in forwards:
        clock.now += forward_s
        callback.on_before_backward(trainer, module, torch.zeros(()))


def test_it_sleeps_for_what_the_step_is_to_be_longer(clock: SimpleNamespace) -> None:
    slow_step(StragglerInjection(factors={0: 2.5}, step_s=0.25), clock, [1.0])
    assert clock.slept == [0.375]


def test_without_step_s_a_step_is_three_forward_passes(clock: SimpleNamespace) -> None:
    slow_step(StragglerInjection(factors={0: 2.5}), clock, [2.0])
    assert clock.slept == [1.5 * 3 * 2.0]


def test_a_second_backward_counts_from_the_first(clock: SimpleNamespace) -> None:
    slow_step(StragglerInjection(factors={0: 2.0}), clock, [2.0, 1.0])
    assert clock.slept == [6.0, 3.0]


def test_other_ranks_do_not_sleep(clock: SimpleNamespace) -> None:
    slow_step(StragglerInjection(factors={0: 2.5}, step_s=0.25), clock, [1.0], rank=1)
    assert sum(clock.slept) == 0.0


def test_a_batch_takes_one_step_of_the_trace_however_many_backwards(clock: SimpleNamespace) -> None:
    callback = StragglerInjection(trace=real_job("AR"), step_s=0.0)
    slow_step(callback, clock, [2.0, 1.0])
    slow_step(callback, clock, [2.0])
    assert clock.slept == [real_job("AR").seconds(0, step) for step in (0, 1)]


def test_with_a_trace_it_sleeps_for_what_is_left(clock: SimpleNamespace) -> None:
    slow_step(StragglerInjection(trace=real_job("AR", scale=1.0)), clock, [2.0], rank=1)
    assert clock.slept == [real_job("AR", scale=1.0).seconds(1, 0) - 3 * 2.0]


def test_a_factor_of_a_rank_that_is_not_there_is_refused() -> None:
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0)
    StragglerInjection(factors={0: 2.0, 1: 2.0}).setup(trainer, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"no rank 2 among 2; write ranks from 0 to 1, or.*devices=3"):
        StragglerInjection(factors={2: 2.0}).setup(trainer, None, "fit")  # type: ignore[arg-type]
