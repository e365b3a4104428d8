"""Thresholds that change while real workers train: bounds of each phase, workers let go at once, interrupted runs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_stale import (
    DSSP,
    SSP,
    BoundedDelay,
    StalenessMonitor,
    StaleSyncStrategy,
    StragglerInjection,
    ThresholdSchedule,
)
from lightning_stale.paradigms import Paradigm
from tests.integration.harness import run_workers, signal_test, wait_for_file
from tests.integration.models import Regression, loader, trainer

BATCHES = 20


def fit_with_milestones(rank: int, paradigm: Paradigm, milestones: Any) -> dict[str, Any]:
    slow = StragglerInjection(factors={1: 4.0}, probability=0.3, slowdown=4.0, step_s=0.002, seed=5)
    strategy = StaleSyncStrategy(paradigm=paradigm)
    callbacks = [slow, StalenessMonitor(save_summary=False), ThresholdSchedule(milestones=milestones)]
    trainer(3, strategy, max_epochs=3, callbacks=callbacks).fit(Regression(), loader(samples=3 * 8 * BATCHES))
    return {**strategy.summary(), "here": strategy.paradigm.thresholds}


@pytest.mark.parametrize(
    ("paradigm", "milestones"),
    [
        (SSP(threshold=6), {1: {"threshold": 1}, 2: {"threshold": 3}}),
        (DSSP(lower=1, upper=7), {1: {"upper": 3}, 2: {"lower": 0, "upper": 0}}),
    ],
    ids=repr,
)
def test_from_the_first_batch_of_an_epoch_no_lead_is_above_its_bound(
    paradigm: Paradigm, milestones: Any, tmp_path: Path
) -> None:
    results = run_workers(fit_with_milestones, 3, tmp_path, paradigm, milestones)
    expected = [dict(paradigm.thresholds)]
    for epoch in (1, 2):
        expected.append({**expected[-1], **milestones[epoch]})
    for result in results:
        assert [phase["thresholds"] for phase in result["phases"]] == expected
        assert [phase["since"] for phase in result["phases"]] == [0, 3 * BATCHES, 6 * BATCHES]
        for phase in result["phases"]:
            assert phase["max_lead"] <= max(phase["thresholds"].values())
        assert result["here"] == expected[-1]
        assert [worker["pushes"] for worker in result["workers"]] == [3 * BATCHES] * 3
    changed = type(paradigm)(**expected[-1])
    assert results[0]["paradigm"] == repr(changed)


class Interplay(L.Callback):
    """Before its first push, rank 0 waits until rank 1 has come to its bound, and changes the threshold: twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1:
            signal_test(self.folder, f"start {batch_idx}")
        elif batch_idx == 0:
            wait_for_file(self.folder / "start 1")  # one ahead; the push of batch 1 waits, or will
            trainer.strategy.set_thresholds(threshold=3)
            wait_for_file(self.folder / "start 3")  # three ahead, without a push of this rank
            trainer.strategy.set_thresholds(threshold=0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.set_thresholds(threshold=7 if trainer.global_rank == 0 else 4)  # rank 0's counts


def fit_interplay(rank: int, folder: Path) -> dict[str, Any]:
    strategy = StaleSyncStrategy(paradigm=SSP(threshold=1))
    trainer(2, strategy, max_epochs=1, callbacks=[Interplay(folder)]).fit(Regression(), loader(samples=2 * 8 * 12))
    return {**strategy.summary(), "here": strategy.paradigm.thresholds}


def test_rank_0_changes_thresholds_amid_a_batch(tmp_path: Path) -> None:
    """Would hang if a raised threshold let nobody go, or a lowered one let nobody catch up."""
    for result in run_workers(fit_interplay, 2, tmp_path, tmp_path):
        leads = [(phase["thresholds"]["threshold"], phase["max_lead"]) for phase in result["phases"]]
        assert leads == [(1, 1), (3, 3), (0, 0), (7, 0)]
        assert [worker["pushes"] for worker in result["workers"]] == [12, 12]
        assert result["here"] == {"threshold": 7}


# --- bounded delay ----------------------------------------------------------------------------------------------------


class StalenessByEpoch(L.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(trainer.current_epoch, []).append(trainer.strategy.last_release.staleness)


def fit_with_delays(rank: int, milestones: Any) -> tuple[dict[int, list[int]], dict[str, Any]]:
    slow = StragglerInjection(factors={1: 4.0}, probability=0.3, slowdown=4.0, step_s=0.002, seed=5)
    strategy, staleness = StaleSyncStrategy(paradigm=BoundedDelay(7)), StalenessByEpoch()
    callbacks = [slow, StalenessMonitor(save_summary=False), staleness, ThresholdSchedule(milestones=milestones)]
    trainer(3, strategy, max_epochs=3, callbacks=callbacks).fit(Regression(), loader(samples=3 * 8 * BATCHES))
    return staleness.seen, {**strategy.summary(), "here": strategy.paradigm.thresholds}


def test_from_the_first_batch_of_an_epoch_no_gradient_is_staler_than_its_delay_allows(tmp_path: Path) -> None:
    delays = [{"delay": 7}, {"delay": 1}, {"delay": 2}]
    results = run_workers(fit_with_delays, 3, tmp_path, {1: delays[1], 2: delays[2]})
    for _, summary in results:
        assert [phase["thresholds"] for phase in summary["phases"]] == delays
        assert [phase["since"] for phase in summary["phases"]] == [0, 3 * BATCHES, 6 * BATCHES]
        assert summary["thresholds"] == summary["here"] == delays[-1]
        assert summary["paradigm"] == "BoundedDelay(delay=2)"
    for epoch, thresholds in enumerate(delays):
        staleness = [seen for each, _ in results for seen in each[epoch]]
        assert len(staleness) == 3 * BATCHES
        assert max(staleness) <= (thresholds["delay"] - 1) + (3 - 1)
    assert [max(each[1]) for each, _ in results] == [0, 0, 0], "a delay of one is sequential"


class DelayInterplay(L.Callback):
    """Amid its first batch, rank 0 waits until rank 1 has begun all that it may, and changes the delay: twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if trainer.global_rank == 1:
            signal_test(self.folder, f"start {self.batches}")
        elif self.batches == 1:
            deadline = time.monotonic() + 60
            while trainer.strategy.summary()["updates"] == 0:  # rank 1's first; for more it has to wait, or will
                assert time.monotonic() < deadline, "rank 1 has not pushed"
                time.sleep(0.02)
            trainer.strategy.set_thresholds(delay=5)
            wait_for_file(self.folder / "start 4")
            trainer.strategy.set_thresholds(delay=1)


def fit_delay_interplay(rank: int, folder: Path) -> dict[str, Any]:
    strategy = StaleSyncStrategy(paradigm=BoundedDelay(2))
    trainer(2, strategy, max_epochs=1, callbacks=[DelayInterplay(folder)]).fit(Regression(), loader(samples=2 * 8 * 12))
    return {**strategy.summary(), "here": strategy.paradigm.thresholds}


def test_rank_0_changes_the_delay_amid_a_batch(tmp_path: Path) -> None:
    """Would hang if a longer delay gave nobody a batch who waits for one, or a shorter one let nobody catch up."""
    for result in run_workers(fit_delay_interplay, 2, tmp_path, tmp_path):
        assert [phase["thresholds"]["delay"] for phase in result["phases"]] == [2, 5, 1]
        assert sum(worker["pushes"] for worker in result["workers"]) == 24
        assert result["thresholds"] == result["here"] == {"delay": 1}


# --- interrupted runs -------------------------------------------------------------------------------------------------

EPOCHS = 6
WAYS: dict[str, dict[str, Any]] = {
    "milestones": {"milestones": {1: {"threshold": 7}, 3: {"threshold": 2}, 4: {"threshold": 4}}},
    "metric": {"monitor": "val_loss", "patience": 2, "factor": 0.5},
}
EXPECTED = {"milestones": [9, 7, 7, 2, 4, 4], "metric": [9, 9, 9, 4, 4, 2]}


class WithMetric(Regression):
    """The metric of rank 0 never improves; that of rank 1 always does."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", -float(self.trainer.current_epoch * self.global_rank))


class Thresholds(L.Callback):
    """Notes the thresholds of each epoch here, which are those of the server; cuts the power if asked to."""

    def __init__(self, cut: bool) -> None:
        self.cut = cut
        self.seen: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        epoch, strategy = trainer.current_epoch, trainer.strategy
        self.seen[epoch] = strategy.paradigm.threshold
        assert strategy.summary()["paradigm"] == repr(strategy.paradigm)
        if self.cut and trainer.global_rank == 1 and (epoch, batch_idx) == (4, 2):
            raise RuntimeError("the power was cut")


def fit_schedule(way: str, folder: Path, cut: bool = False) -> tuple[dict[int, int], dict[str, Any]]:
    """Fit, from the last checkpoint if there is one; it is of the end of an epoch. Return thresholds and state."""
    seen, schedule = Thresholds(cut), ThresholdSchedule(**WAYS[way])
    callbacks = [schedule, seen, ModelCheckpoint(folder, filename="last")]
    t = trainer(
        2, StaleSyncStrategy(paradigm=SSP(9)), max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True
    )
    path = next(folder.glob("*.ckpt"), None)
    with pytest.raises(RuntimeError, match="the power was cut") if cut else contextlib.nullcontext():
        t.fit(WithMetric(), loader(samples=2 * 8 * 5), loader(samples=16), ckpt_path=path)
    return seen.seen, schedule.state_dict()


def fit_cut(rank: int, folder: Path) -> dict[str, Any]:
    return {way: fit_schedule(way, folder / way, cut=True) for way in WAYS}


def fit_whole_and_resumed(rank: int, folder: Path) -> dict[str, Any]:
    return {way: (fit_schedule(way, folder / "whole" / way), fit_schedule(way, folder / way)) for way in WAYS}


def test_an_interrupted_and_resumed_run_has_the_same_thresholds_as_a_whole_one(tmp_path: Path) -> None:
    """The metric way resumes with one comparison without improvement, the other one right before a milestone."""
    cut = run_workers(fit_cut, 2, tmp_path / "a", tmp_path, timeout=120)
    ended = run_workers(fit_whole_and_resumed, 2, tmp_path / "b", tmp_path, timeout=120)
    assert ended[0] == ended[1], "rank 0 decides for all"
    for before, after in zip(cut, ended, strict=True):
        for way, ((whole, state), (resumed, resumed_state)) in after.items():
            assert list(whole.values()) == EXPECTED[way]
            assert before[way][0] == {epoch: whole[epoch] for epoch in range(5)}
            assert resumed == {epoch: whole[epoch] for epoch in (4, 5)}
            assert resumed_state == state
