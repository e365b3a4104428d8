"""Timelines of real processes: of each strategy all that has happened is there, and in order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_stale import DSPStrategy, HPSGDStrategy, StaleSyncStrategy, Timeline
from lightning_stale.recording.trace import SERVER
from tests.integration.harness import run_workers
from tests.integration.models import Regression, loader, trainer
from tests.unit.pipeline.networks import Chain, batches
from tests.unit.recording.test_trace import check, list_of

STEPS = 12


def train(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, strategy in {
        "ssp": StaleSyncStrategy(paradigm="ssp"),
        "bounded-delay": StaleSyncStrategy(paradigm="bounded-delay", transport="tcp"),
        "hpsgd": HPSGDStrategy(interval=2),
        "dsp": DSPStrategy(),
    }.items():
        t = trainer(2, strategy, max_epochs=1, callbacks=[Timeline(folder / f"{name}.json")])
        if name == "dsp":
            t.fit(Chain(), batches(STEPS))
        else:
            t.fit(Regression(), loader(2 * STEPS * 8))
        found[name] = t.strategy.summary()
    return found


def slices(events: list[dict[str, Any]]) -> Counter[tuple[int, str]]:
    return Counter((event["pid"], event["name"]) for event in events if event["ph"] == "X")


def test_all_that_has_happened_is_there(tmp_path: Path) -> None:
    found, _ = run_workers(train, 2, tmp_path, tmp_path)
    events = {name: list_of(tmp_path / f"{name}.json") for name in found}
    for name in found:
        check(events[name])
    for name in ("ssp", "bounded-delay"):
        seen = Counter(
            event["args"]["worker"] for event in events[name] if event["pid"] == SERVER and event["ph"] == "X"
        )
        assert seen == {worker["rank"]: worker["pushes"] for worker in found[name]["workers"]}
        stale = [(event["pid"], event["args"]["updates"]) for event in events[name] if event["name"] == "staleness"]
        for worker in found[name]["workers"]:
            its = [updates for rank, updates in stale if rank == worker["rank"]]
            assert (len(its), max(its), sum(its) / len(its)) == (
                *(worker["pushes"], worker["max_staleness"], worker["mean_staleness"]),
            )
    (*_, compute) = (event for event in events["bounded-delay"] if event["name"] == "compute" and event["args"])
    assert set(compute["args"]) == {"batches"}
    seen = slices(events["hpsgd"])
    assert {seen[rank, "average"] > 0 for rank in (0, 1)} == {True}
    assert [seen[rank, "step"] for rank in (0, 1)] == [worker["steps"] - 1 for worker in found["hpsgd"]["workers"]]
    seen = slices(events["dsp"])
    assert {(stage, work): seen[stage, work] for stage in (0, 1) for work in ("forward", "backward")} == {
        **{(0, "forward"): STEPS, (0, "backward"): STEPS},
        **{(1, "forward"): seen[1, "forward"], (1, "backward"): STEPS},
    }
    assert seen[1, "wait for features"] == seen[0, "wait for gradients"] == STEPS
    arrows = Counter(event["name"] for event in events["dsp"] if event["ph"] == "f")
    assert arrows == {"features": STEPS, "gradients": STEPS}
    assert not list(tmp_path.glob("*.rank*.json"))  # they have been made one


def test_a_strategy_that_tells_nothing_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Timeline shows who waits for whom, and SingleDeviceStrategy"):
        trainer(1, "auto", max_epochs=1, callbacks=[Timeline()]).fit(Regression(), loader())
