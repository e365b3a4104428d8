"""BSP equals DDP, one worker equals the plain Trainer, and every gradient is applied exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import run_workers
from tests.integration.models import Regression, assert_same, loader, trainer, weights

STEPS = 100


def fit(rank: int, world_size: int, strategy: Any, optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    model = Regression(optimizer, **options)
    t = trainer(world_size, strategy, max_steps=STEPS, use_distributed_sampler=world_size > 1)
    t.fit(model, loader(samples=8 * 32 * world_size))
    return weights(model)


@pytest.mark.parametrize("paradigm", ["bsp", "asp", "ssp", "dssp"])
@pytest.mark.parametrize(("optimizer", "options"), [("SGD", {"lr": 0.05, "momentum": 0.9}), ("Adam", {"lr": 0.01})])
def test_one_worker_equals_the_plain_trainer_bit_for_bit(
    paradigm: str, optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plain = run_workers(fit, 1, tmp_path / "plain", 1, "auto", optimizer, options)[0]
    stale = run_workers(fit, 1, tmp_path / "stale", 1, paradigm, optimizer, options)[0]
    assert_same(plain, stale)
