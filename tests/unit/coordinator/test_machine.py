"""The coordinator, whatever happens: thousands of random events here, a million in ``make soak``."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.coordinator.machine import Machine, events, reached

EVENTS = int(os.environ.get("LIGHTNING_STALE_SOAK_EVENTS", "20000"))
KINDS = ("Join", "Withdraw", "Prepared", "Push", "Arrive", "Request", "Leave", "Lose", "Abort", "SetThresholds")
RARE = ("over", "rounds", "epochs", "ends", "taken back", "meetings amid a segment", "joins", "interrupted regions")


@pytest.mark.timeout(0 if "LIGHTNING_STALE_SOAK_EVENTS" in os.environ else 180)
def test_whatever_happens() -> None:
    def there_is_enough() -> bool:
        all_kinds = min(events[kind] for kind in KINDS) > EVENTS / 2_000
        return events.total() >= EVENTS and all_kinds and min(reached[name] for name in RARE) > EVENTS / 20_000

    # Seeded, or else hypothesis, where CI is set, would run the very same events again and again.
    runs = itertools.count(first := int(os.environ.get("LIGHTNING_STALE_SOAK_SEED", "0")))
    while not there_is_enough():
        assert events.total() < 5 * EVENTS, f"what is to be seen does not happen: {events} {reached}"
        run_state_machine_as_test(
            seed(next(runs))(Machine),
            settings=settings(
                max_examples=25 if EVENTS < 10**5 else 500,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            ),
        )
    print(f"{events.total():,} events from seed {first} on: {dict(events)}")
    print(f"{dict(reached)}")
