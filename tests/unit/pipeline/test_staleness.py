"""Presets, the paper's queues, and errors that name the value and the cure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stale.pipeline.staleness import Staleness


@pytest.mark.parametrize(
    ("preset", "stages", "m"),
    [
        ("bp", 3, (0, 0, 0)),
        ("minimal", 4, (3, 2, 1, 0)),
        ("dsp", 4, (6, 4, 2, 0)),
        ("dsp", 1, (0,)),
        ((10, 5, 0), 3, (10, 5, 0)),
        ([3, 3, 0], 3, (3, 3, 0)),
    ],
)
def test_staleness_of_a_preset_or_a_tuple(preset: Any, stages: int, m: tuple[int, ...]) -> None:
    staleness = Staleness.of(preset, stages)
    assert staleness.m == m
    assert staleness.stages == stages


def test_the_papers_example() -> None:
    paper = Staleness.of((4, 2, 0), 3, queues=(1, 1, 0))
    assert (paper.p, paper.q) == ((1, 1, 0), (0, 1, 1))
    assert paper == Staleness.of("dsp", 3), "DSP(1,1,0; 4,2,0) is the default"


def test_a_queue_of_zero_locks_a_direction() -> None:
    assert Staleness.of((4, 2, 0), 3, queues=(2, 0, 0)).q == (0, 0, 2)


falling = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(
    lambda lags: tuple(sum(lags[k:]) for k in range(len(lags) + 1))
)


@given(m=falling)
def test_by_default_what_waits_between_two_stages_is_shared_by_both_directions(m: tuple[int, ...]) -> None:
    staleness = Staleness.of(m, len(m))
    assert staleness.p[-1] == 0
    assert staleness.q[0] == 0
    for k in range(len(m) - 1):
        features, gradients = staleness.p[k], staleness.q[k + 1]
        assert features + gradients == m[k] - m[k + 1]
        assert 0 <= features - gradients <= 1


@pytest.mark.parametrize(
    ("staleness", "queues", "value", "cure"),
    [
        ("dps", None, "staleness='dps' is unknown", "'dsp', 'minimal', 'bp', or a tuple such as (4, 2, 0)"),
        ((2, 0), None, "staleness=(2, 0) has 2 values for 3 stages", "one per stage, e.g. (4, 2, 0)"),
        ((4, -1, 0), None, "staleness=(4, -1, 0)", "integers >= 0, e.g. (4, 2, 0)"),
        ((4, 2.0, 0), None, "staleness=(4, 2.0, 0)", "integers >= 0, e.g. (4, 2, 0)"),
        ((True, False, 0), None, "staleness=(True, False, 0)", "integers >= 0, e.g. (4, 2, 0)"),
        ((2, 4, 0), None, "staleness=(2, 4, 0)", "non-increasing values that end in 0, e.g. (4, 2, 0)"),
        ((4, 2, 1), None, "staleness=(4, 2, 1)", "non-increasing values that end in 0, e.g. (4, 2, 0)"),
        ("dsp", (1, 1), "queues=(1, 1)", "one integer >= 0 per stage, the last 0, e.g. queues=(1, 1, 0)"),
        ("dsp", (1, -1, 0), "queues=(1, -1, 0)", "e.g. queues=(1, 1, 0)"),
        ("dsp", (1, 1, 1), "queues=(1, 1, 1)", "the last 0, e.g. queues=(1, 1, 0)"),
        ("dsp", (1, 1.5, 0), "queues=(1, 1.5, 0)", "one integer >= 0 per stage"),
        ("dsp", (1, 3, 0), "queues[1] = 3", "write at most 2, or more staleness"),
        ("bp", (1, 0, 0), "queues[0] = 1", "write at most 0, or more staleness"),
    ],
)
def test_every_error_names_the_value_and_the_cure(staleness: Any, queues: Any, value: str, cure: str) -> None:
    with pytest.raises(ValueError, match="write") as raised:
        Staleness.of(staleness, 3, queues)
    assert value in str(raised.value)
    assert cure in str(raised.value)
