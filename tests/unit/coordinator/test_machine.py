"""The coordinator, whatever happens: thousands of random events here, a million in ``make soak``."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.coordinator.machine import Machine, events

EVENTS = int(os.environ.get("LIGHTNING_STALE_SOAK_EVENTS", "0")) or 4_000


def test_whatever_happens() -> None:
    steps = 100
    suppressed = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    before = events.total()
    while events.total() - before < EVENTS:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Machine,
            settings=settings(
                max_examples=50 if EVENTS < 10**5 else 2_000,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=suppressed,
                database=None,
            ),
        )
    told = dict(events)
    print(f"{events.total() - before} events: {told}")
    assert {"Join", "Push", "Arrive", "Request", "Leave", "Lose", "Abort", "SetThresholds"} <= told.keys()
