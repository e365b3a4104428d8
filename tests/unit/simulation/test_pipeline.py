"""Simulated pipelines against formulas, an independent simulation, and what was measured of real ones."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stale.simulation import (
    Costs,
    DSPSetting,
    PipelineOutcome,
    StageTimes,
    choose_pipeline,
    draw_stages,
    parse_pipeline,
    run_pipeline,
    usual_pipelines,
)
from lightning_stale.simulation.pipeline.engine import StageRun, Work, run_stages
from lightning_stale.simulation.pipeline.run import NOTHING
from lightning_stale.simulation.pipeline.setting import FlushingSetting
from tests.unit.simulation.pipelines import dsp_works, simulate

EQUAL = draw_stages(4, 0.020, 0.040, batches=1)


def efficiency(name: str, times: StageTimes, costs: Costs = NOTHING, batches: int = 2000) -> float:
    return run_pipeline(parse_pipeline(name), times, costs, batches=batches).efficiency


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
def test_balanced_stages_have_the_speed_of_the_model(stages: int) -> None:
    """Section 3 of algorithms.md: 1, 3K/4 and K times the speed of one device, which is 1/K of the limit."""
    times = draw_stages(stages, 1.0, 2.0, batches=1)
    bubble = 2000 / (2000 + stages - 1)
    assert efficiency("bp", times) == pytest.approx(1 / stages)
    for name in ("minimal", "dsp"):
        assert efficiency(f"{name}@no-recompute", times) == pytest.approx(bubble, abs=0.002)
        assert efficiency(name, times) == pytest.approx(3 / 4 if stages > 1 else 1.0, abs=0.004)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "parts"), [(4, 8), (4, 1), (2, 16), (5, 3)])
def test_microbatches_leave_the_bubble_that_is_known(schedule: str, stages: int, parts: int) -> None:
    times = draw_stages(stages, 1.0, 2.0, batches=1)
    assert efficiency(f"{schedule}:{parts}", times, batches=20) == pytest.approx(parts / (parts + stages - 1))


def test_gpipe_pays_for_each_hop_once_and_for_what_microbatches_do_not_divide() -> None:
    costs = Costs(message_s=0.001, features_s=0.008, operation_s=0.0005)
    outcome = run_pipeline(parse_pipeline("gpipe:8"), EQUAL, costs, batches=10)
    part = (0.020 - 0.0005) / 8 + (0.040 - 0.0005) / 8 + 2 * 0.0005
    assert outcome.seconds == pytest.approx(10 * ((8 + 3) * part + 2 * 3 * 0.002))


def test_back_propagation_pays_for_every_message() -> None:
    outcome = run_pipeline(parse_pipeline("bp"), EQUAL, Costs(message_s=0.003, features_s=0.002), batches=10)
    assert outcome.seconds == pytest.approx(10 * (4 * 0.060 + 6 * 0.005))


def test_the_slowest_stage_is_the_limit_if_staleness_hides_the_rest() -> None:
    times = draw_stages(4, [0.02, 0.02, 0.05, 0.02], [0.04, 0.04, 0.10, 0.04], update_s=0.01, batches=1)
    outcome = run_pipeline(parse_pipeline("dsp@no-recompute"), times, Costs(message_s=0.03), batches=3000)
    assert times.own_rate == pytest.approx(1 / 0.16)
    assert outcome.efficiency == pytest.approx(1.0, abs=0.002)
    assert outcome.utilisation == pytest.approx((7 / 16, 7 / 16, 1.0, 7 / 16), abs=0.002)


# --- what has been measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("dsp", 0.52),
        ("dsp@no-recompute", 0.68),
        ("minimal@no-recompute", 0.58),
        ("bp", 0.19),
        ("dsp@no-recompute", 0.67),  # the bare prototype of design/benchmarks.md; and
        ("minimal@no-recompute", 0.61),
    ],
)
def test_stages_that_double_their_time_come_out_as_measured(name: str, measured: float) -> None:
    """``benchmarks/pipeline.py`` on this machine: every forward and backward twice as long with probability 1/3."""
    times = draw_stages(4, 0.020, 0.040, stragglers=1 / 3, batches=1000)
    rate = run_pipeline(parse_pipeline(name), times, batches=1000).rate
    assert rate * 0.060 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("name", "measured"), [("gpipe:8", 0.62), ("1f1b:8", 0.63)])
def test_microbatches_come_out_as_measured_with_what_they_do_not_divide(name: str, measured: float) -> None:
    """Free messages and operations would give 8 / 11 = 0.73; half a millisecond of each operation is Python's."""
    costs = Costs(operation_s=0.0005, message_s=0.0005)
    assert efficiency(name, EQUAL, costs, batches=20) == pytest.approx(measured, rel=0.05)


# --- another simulation -----------------------------------------------------------------------------------------------


def random_world(seed: int) -> tuple[DSPSetting, StageTimes, float, int]:
    draw = random.Random(seed)
    stages, batches = draw.randint(1, 5), draw.randint(1, 12)
    lags = [draw.randint(0, 3) for _ in range(stages - 1)]
    m = tuple(sum(lags[k:]) for k in range(stages))
    queues = (*(draw.randint(0, lag) for lag in lags), 0) if draw.random() < 0.5 else None
    forward, backward = (
        tuple(tuple(draw.randint(1, 16) / 8 for _ in range(5)) for _ in range(stages)) for _ in range(2)
    )
    setting = DSPSetting("random", m, recompute=draw.random() < 0.5, queues=queues)
    return setting, StageTimes("random", forward, backward), draw.choice([0.0, 0.125, 3.0]), batches


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_dsp_equals_a_simulation_with_semaphores(seed: int) -> None:
    setting, times, message_s, batches = random_world(seed)
    outcome = run_pipeline(setting, times, Costs(message_s=message_s), batches=batches)
    staleness = setting.of(times.stages)
    works = [
        dsp_works(m, times.forward[k], times.backward[k], batches, setting.recompute) for k, m in enumerate(staleness.m)
    ]
    ends, waits = simulate(works, staleness.p, staleness.q, message_s)
    assert [stage.ended for stage in outcome.stages] == ends
    for stage, wait in zip(outcome.stages, waits, strict=True):
        found = {"features": stage.features_s, "gradients": stage.gradients_s, "sending": stage.sending_s}
        assert found == wait
        assert stage.busy_s + sum(wait.values()) == pytest.approx(stage.ended)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), parts=st.integers(1, 6), schedule=st.sampled_from(["gpipe", "1f1b"]))
def test_microbatches_equal_a_simulation_with_semaphores(seed: int, parts: int, schedule: Any) -> None:
    _, times, message_s, batches = random_world(seed)
    setting = FlushingSetting("", schedule, parts)
    outcome = run_pipeline(setting, times, Costs(message_s=message_s), batches=batches)
    works = []
    for k in range(times.stages):
        ahead = parts if schedule == "gpipe" else min(parts, times.stages - k)
        order = ["forward"] * ahead + ["backward", "forward"] * (parts - ahead) + ["backward"] * ahead
        of = {"forward": times.forward[k], "backward": times.backward[k]}
        works.append([(kind, of[kind][n % 5] / parts) for n in range(batches) for kind in order])
    free = [math.inf] * times.stages
    ends, _ = simulate(works, free, free, message_s)
    assert [stage.ended for stage in outcome.stages] == pytest.approx(ends)


def test_stages_that_wait_for_each_other_for_ever_are_found() -> None:
    """Who sends before it receives, over locked queues; no staleness leads there."""
    works = [[Work("forward", 1.0), Work("backward", 1.0)], [Work("backward", 1.0), Work("forward", 1.0)]]
    with pytest.raises(ValueError, match=r"stages \[0, 1\] wait for each other for ever"):
        run_stages(works, (0, 0), (0, 0), lambda direction, sender, number: 0.0)


# --- times, settings, costs -------------------------------------------------------------------------------------------


def test_drawn_times_have_their_medians_and_stragglers() -> None:
    times = draw_stages(2, 1.0, [2.0, 4.0], jitter=0.1, stragglers=0.2, straggler_factor=10.0, batches=4000, update_s=1)
    assert sorted(times.forward[0])[1600] == pytest.approx(1.0, rel=0.02)  # the median of the eight tenths
    assert sorted(times.backward[1])[1600] == pytest.approx(4.0, rel=0.02)
    assert sum(time > 6.0 for time in times.forward[1]) == pytest.approx(800, rel=0.1)
    assert times.update == ((1,), (1,))
    assert times.name == "1000/2000 to 4000 ms forward/backward"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"stages": 0}, "stages=0, batches=200: write at least one of each"),
        ({"stages": 3, "forward_s": [1.0, 2.0]}, "forward_s has 2 values for 3 stages: write one, or one per stage"),
        ({"stages": 1, "stragglers": -0.1}, "stragglers=-0.1: write a probability"),
        ({"stages": 1, "jitter": -1}, "jitter=-1: write a spread"),
        ({"stages": 2, "backward_s": 0.0}, "stage 0 has a backward of 0.0 s, and no time that can be"),
    ],
)
def test_times_that_cannot_be_drawn_are_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        draw_stages(**{"forward_s": 1.0, "backward_s": 1.0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((), ()), "there is no stage"),
        ((((1.0,),), ()), "backward has 0 stages and forward has 1: write one each"),
        ((((1.0,),), ((1.0,),), ((1.0,), (1.0,))), "update has 2 stages"),
        ((((1.0,), ()), ((1.0,), (1.0,))), "stage 1 has no time that can be: write seconds above 0"),
        ((((1.0,),), ((math.nan,),)), "stage 0 has a backward of nan s"),
        ((((1.0,),), ((1.0,),), ((-1.0,),)), "stage 0 has a update of -1.0 s"),
    ],
)
def test_times_that_are_none_are_refused(arguments: Any, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        StageTimes("x", *arguments)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["message_s", "features_s", "operation_s"])
def test_costs_are_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Costs\({name}={value}\): write a number of at least 0"):
        Costs(**{name: value})


@pytest.mark.parametrize(
    ("text", "staleness", "recompute"),
    [
        ("dsp", "dsp", True),
        ("DSP@recompute", "dsp", True),
        ("minimal@no-recompute", "minimal", False),
        ("9,6,3,0", (9, 6, 3, 0), True),
    ],
)
def test_settings_are_parsed(text: str, staleness: Any, recompute: bool) -> None:
    setting = parse_pipeline(text)
    assert isinstance(setting, DSPSetting)
    assert (setting.staleness, setting.recompute, setting.queues) == (staleness, recompute, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1f1b:0", "0 microbatches are none"),
        ("gpipe:x", "invalid literal"),
        ("1f1b:8@no-recompute", "1f1b keeps its graphs for a batch"),
        ("dsp@fast", "after @ write recompute or no-recompute"),
        ("dssp", "setting 'dssp': invalid literal"),
    ],
)
def test_a_setting_that_is_none_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        parse_pipeline(text)
    assert "Write one of dsp, minimal, bp or m itself, e.g. 6,4,2,0" in str(raised.value)


def test_staleness_of_another_number_of_stages_is_refused_as_by_the_strategy() -> None:
    with pytest.raises(ValueError, match=r"staleness=\(4, 2, 0\) has 3 values for 4 stages"):
        run_pipeline(parse_pipeline("4,2,0"), EQUAL)
    with pytest.raises(ValueError, match="batches=0: write at least one"):
        run_pipeline(parse_pipeline("dsp"), EQUAL, batches=0)


# --- the choice -------------------------------------------------------------------------------------------------------


def outcome(name: str, seconds: float, staleness: int) -> PipelineOutcome:
    return PipelineOutcome(name, (staleness, 0), 100, 1.25, (StageRun(ended=seconds), StageRun(ended=seconds / 2)))


@pytest.mark.parametrize(
    ("outcomes", "chosen", "gain"),
    [
        ([("e", 100.0, 0), ("a", 50.0, 6), ("b", 80.0, 2)], "a", 2.0),
        ([("e", 100.0, 0), ("a", 50.0, 7), ("b", 80.0, 2)], "b", 1.25),  # too stale
        ([("e", 100.0, 0), ("a", 50.0, 6), ("b", 50.9, 2)], "b", 100 / 50.9),  # as fast, and less stale
        ([("e", 100.0, 0), ("f", 90.0, 0), ("a", 86.0, 2)], "f", 1.0),
        ([("e", 100.0, 0), ("a", 50.0, 7)], "e", 1.0),
        ([("a", 50.0, 6)], "a", 1.0),
    ],
)
def test_the_fastest_within_the_bound_is_chosen(
    outcomes: list[tuple[str, float, int]], chosen: str, gain: float
) -> None:
    choice = choose_pipeline([outcome(*each) for each in outcomes], max_staleness=6)
    assert (choice.outcome.name, choice.gain) == (chosen, pytest.approx(gain))
    assert choice.sentence.startswith(f"Choose {chosen}:")
    if gain > 1:
        assert f"e is better if that staleness costs more than {gain:.2f} times" in choice.sentence
    if chosen == "f":
        assert "is 5 % faster (the best is a, 1.05 times), and its gradients are never stale." in choice.sentence
    if chosen == "e":
        assert choice.sentence.endswith("never stale; a would be 2.00 times as fast.")


def test_a_bound_that_nothing_keeps_to_is_refused() -> None:
    with pytest.raises(ValueError, match="max_staleness=1: every setting that is compared is staler; write 2"):
        choose_pipeline([outcome("a", 1.0, 2), outcome("b", 1.0, 4)], max_staleness=1)


def test_an_outcome_says_what_came_out() -> None:
    times = StageTimes("", ((1.0,), (1.0,)), ((2.0,), (2.0,)))
    assert run_pipeline(usual_pipelines()[2], times, batches=2).row() == {
        "setting": "bp",
        "staleness": [0, 0],
        "epoch_s": 12.0,
        "batches_per_s": 1 / 6,
        "efficiency": 0.5,
        "utilisation": [0.5, 0.5],
        "waiting": {
            "features": [0.0, pytest.approx(1 / 3)],  # for the second batch, 2 + 1 s
            "gradients": [0.5, 0.0],
            "sending": [0.0, 0.0],
        },
    }
