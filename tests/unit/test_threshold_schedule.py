"""What the schedule decides, without processes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from lightning_stale import ASP, BSP, DSSP, SSP, BoundedDelay, StaleSyncStrategy, ThresholdSchedule
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.client import Meeting
from lightning_stale.strategies.other_ranks import OtherRanks

MODULE: Any = None
MILESTONES = {2: {"threshold": 8}, 5: {"threshold": 1}}


def trainer_with(strategy: Any) -> Trainer:
    if isinstance(strategy, Paradigm):
        strategy = StaleSyncStrategy(paradigm=strategy)
    return Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, r"milestones=None, monitor=None: write one of them"),
        ({"milestones": MILESTONES, "monitor": "val_loss"}, r"monitor='val_loss': write one of them"),
        ({"milestones": MILESTONES, "patience": 2}, r"patience=2, .* belong to monitor=...: leave them out"),
        ({"milestones": MILESTONES, "mode": "max"}, r"mode='max', .* belong to monitor=...: leave them out"),
        ({"milestones": {}}, r"milestones=\{\}: write the thresholds from some epochs on, e.g. milestones=\{5: "),
        ({"milestones": [5, 10]}, r"milestones=\[5, 10\]: write the thresholds"),
        ({"milestones": {-1: {"threshold": 3}}}, r"milestones=\{-1: ...\}: epochs are integers >= 0"),
        ({"milestones": {"5": {"threshold": 3}}}, r"milestones=\{'5': ...\}: epochs are integers >= 0"),
        ({"milestones": {True: {"threshold": 3}}}, r"milestones=\{True: ...\}: epochs are integers >= 0"),
        ({"milestones": {5: 8}}, r"milestones=\{5: 8\}: thresholds have names"),
        ({"milestones": {5: {}}}, r"milestones=\{5: \{\}\}: thresholds have names"),
        ({"milestones": {5: {"threshold": 1.5}}}, r"\{'threshold': 1.5\}\}: thresholds have names, and are integers"),
        ({"milestones": {5: {"threshold": -1}}}, r"\{'threshold': -1\}\}: thresholds have names, and are integers"),
        ({"monitor": "loss", "mode": "auto"}, r"mode='auto': write 'min' for a metric that is to fall, or 'max'"),
        ({"monitor": "loss", "patience": 0}, r"patience=0: write after how many checks"),
        ({"monitor": "loss", "patience": 1.5}, r"patience=1.5: write after how many checks"),
        ({"monitor": "loss", "factor": 1.0}, r"factor=1.0: write what thresholds are multiplied by, between 0 and 1"),
        ({"monitor": "loss", "factor": 0}, r"factor=0: write what thresholds are multiplied by"),
        ({"monitor": "loss", "factor": math.nan}, r"factor=nan: write what thresholds are multiplied by"),
        ({"monitor": "loss", "minimum": -1}, r"minimum=-1: write the value below which no threshold"),
        ({"monitor": "loss", "minimum": True}, r"minimum=True: write the value below which no threshold"),
    ],
    ids=repr,
)
def test_bad_arguments_are_refused_with_the_value_and_the_cure(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ThresholdSchedule(**arguments)


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("auto", "SingleDeviceStrategy has none"),
        ("ddp", "DDPStrategy has none"),
        ("hpsgd", "HPSGDStrategy has none"),
        ("dsp", "DSPStrategy has none"),
        (BSP(), r"paradigm=BSP\(\) has none"),
        (ASP(), r"paradigm=ASP\(\) has none"),
    ],
    ids=repr,
)
def test_strategies_without_thresholds_are_refused_with_the_cure(strategy: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=text) as error:
        ThresholdSchedule(monitor="val_loss").setup(trainer_with(strategy), MODULE, "fit")
    assert "write Trainer(strategy='ssp'), 'dssp' or 'bounded-delay', or leave the schedule out" in str(error.value)


@pytest.mark.parametrize(
    ("paradigm", "milestones", "text"),
    [
        (SSP(3), {5: {"upper": 6}}, r"milestones=\{5: \{'upper': 6\}\}: set_thresholds\(upper=6\): SSP has threshold"),
        (DSSP(3, 9), {5: {"threshold": 6}}, r"DSSP has lower and upper"),
        (DSSP(3, 9), {1: {"lower": 6}, 5: {"upper": 4}}, r"milestones=\{5: .*lower must not exceed upper"),
        (BoundedDelay(), {5: {"threshold": 6}}, r"set_thresholds\(threshold=6\): BoundedDelay has delay"),
        (BoundedDelay(), {5: {"delay": 0}}, r"milestones=\{5: \{'delay': 0\}\}: BoundedDelay\(delay=0\)"),
    ],
)
def test_milestones_that_do_not_fit_the_paradigm_are_refused_before_training(
    paradigm: Paradigm, milestones: Any, text: str
) -> None:
    trainer = trainer_with(paradigm)
    with pytest.raises(MisconfigurationException, match=text):
        ThresholdSchedule(milestones=milestones).setup(trainer, MODULE, "fit")
    assert trainer.strategy.paradigm.thresholds == paradigm.thresholds  # type: ignore[attr-defined]


def test_a_minimum_that_the_paradigm_cannot_have_is_refused_before_training() -> None:
    schedule = ThresholdSchedule(monitor="loss", minimum=0)
    schedule.setup(trainer_with(DSSP(3, 9)), MODULE, "fit")
    with pytest.raises(MisconfigurationException, match=r"minimum=0: BoundedDelay\(delay=0\): delay counts leases"):
        schedule.setup(trainer_with(BoundedDelay(8)), MODULE, "fit")


def test_a_metric_that_was_not_logged_is_an_error_with_those_that_were() -> None:
    trainer = trainer_with(SSP(3))
    trainer._logger_connector._callback_metrics = {"train_loss": torch.tensor(1.0), "val_acc": torch.tensor(0.5)}
    with pytest.raises(MisconfigurationException, match=r"monitor='val_loss'.*there are 'train_loss', 'val_acc'"):
        ThresholdSchedule(monitor="val_loss")._check_metric(trainer)


# --- decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"patience": 1}, [3, 2, 2, 1, 1, 1, 1], [12, 12, 6, 6, 3, 1, 1]),
        ({"patience": 2}, [3, 2, 2, 2.5, 2, 1, 2, 2], [12, 12, 12, 6, 6, 6, 6, 3]),
        ({"patience": 2, "mode": "max"}, [3, 2, 4, 4, 4, 5], [12, 12, 12, 12, 6, 6]),
        ({"patience": 1, "factor": 0.9, "minimum": 10}, [1, 1, 1, 1], [12, 10, 10, 10]),
        ({"patience": 1, "minimum": 0}, [1, 1, 1, 1, 1, 1, 1], [12, 6, 3, 1, 0, 0, 0]),
        ({"patience": 1, "minimum": 20}, [1, 1, 1], [12, 12, 12]),  # never raised
        ({"patience": 2}, [math.nan, math.nan, math.nan, 5, math.nan, 4, math.inf], [12, 6, 6, 6, 6, 6, 6]),
        ({"patience": 1, "mode": "max"}, [math.nan, -math.inf, 1, math.inf], [6, 3, 3, 3]),
    ],
)
def test_thresholds_fall_when_the_metric_stops_improving(
    options: dict[str, Any], values: list[float], expected: list[int]
) -> None:
    schedule, thresholds, seen = ThresholdSchedule(monitor="loss", **options), {"threshold": 12}, []
    for value in values:
        thresholds = schedule.thresholds_after(value, thresholds)
        seen.append(thresholds["threshold"])
    assert seen == expected


def test_both_thresholds_of_dssp_fall_and_stay_in_order() -> None:
    schedule, thresholds, seen = ThresholdSchedule(monitor="loss", patience=1), {"lower": 3, "upper": 15}, []
    for _ in range(5):
        thresholds = schedule.thresholds_after(1.0, thresholds)
        seen.append(tuple(thresholds.values()))
    assert seen == [(3, 15), (1, 7), (1, 3), (1, 1), (1, 1)]


def test_milestones_come_in_the_order_of_epochs_whatever_the_order_of_writing() -> None:
    schedule = ThresholdSchedule(milestones={4: {"upper": 5}, 2: {"lower": 1, "upper": 9}})
    assert [schedule.milestones_due(epoch) for epoch in (0, 1, 2, 3, 4, 5)] == [
        *({}, {}, {"lower": 1, "upper": 9}, {}, {"upper": 5}, {})
    ]
    late = ThresholdSchedule(milestones={4: {"upper": 5}, 2: {"lower": 1, "upper": 9}})
    assert late.milestones_due(7) == {"lower": 1, "upper": 5}


def test_milestones_may_come_from_a_yaml_file() -> None:
    config = OmegaConf.create("milestones: {5: {threshold: 8}, 10: {threshold: 3}}")
    schedule = ThresholdSchedule(**config)
    assert schedule.milestones == {5: {"threshold": 8}, 10: {"threshold": 3}}
    assert [type(thresholds) for thresholds in schedule.milestones.values()] == [dict, dict]


# --- state --------------------------------------------------------------------------------------------------------


def through_a_checkpoint(schedule: ThresholdSchedule) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def at_epoch(trainer: Trainer, epoch: int) -> Trainer:
    trainer.fit_loop.epoch_progress.current.completed = epoch
    return trainer


def test_a_resumed_schedule_goes_on_with_its_thresholds_best_value_and_count() -> None:
    first = ThresholdSchedule(monitor="loss", patience=2)
    trainer = trainer_with(SSP(8))
    first.on_train_start(trainer, MODULE)
    trainer._logger_connector._callback_metrics = {"loss": torch.tensor(1.0)}
    for _ in range(4):  # the best, two without improvement, and one more
        first._check_metric(trainer)
    assert trainer.strategy.paradigm.thresholds == {"threshold": 4}  # type: ignore[attr-defined]

    second = ThresholdSchedule(monitor="loss", patience=2)
    resumed = trainer_with(SSP(8))
    second.load_state_dict(through_a_checkpoint(first))
    assert second.state_dict() == first.state_dict(), "saved before training has started again"
    second.on_train_start(resumed, MODULE)
    assert resumed.strategy.paradigm.thresholds == {"threshold": 4}  # type: ignore[attr-defined]
    assert second.state_dict() == first.state_dict()
    for one, schedule in ((trainer, first), (resumed, second)):
        one._logger_connector._callback_metrics = {"loss": torch.tensor(1.5)}
        schedule._check_metric(one)
        assert one.strategy.paradigm.thresholds == {"threshold": 2}  # type: ignore[attr-defined]


def test_a_milestone_is_passed_once_also_after_a_resume() -> None:
    first, trainer = ThresholdSchedule(milestones=MILESTONES), trainer_with(SSP(3))
    first.on_train_start(at_epoch(trainer, 2), MODULE)
    trainer.strategy.set_thresholds(threshold=5)  # type: ignore[attr-defined]
    first.on_train_epoch_start(at_epoch(trainer, 3), MODULE)
    assert trainer.strategy.paradigm.thresholds == {"threshold": 5}  # type: ignore[attr-defined]

    for epoch, threshold in ((2, 8), (4, 8), (5, 1)):
        second, resumed = ThresholdSchedule(milestones=MILESTONES), trainer_with(SSP(3))
        second.load_state_dict(through_a_checkpoint(first))
        second.on_train_start(at_epoch(resumed, epoch), MODULE)
        assert resumed.strategy.paradigm.thresholds == {"threshold": threshold}  # type: ignore[attr-defined]


def test_a_schedule_that_joins_later_passes_the_milestones_of_before() -> None:
    schedule, trainer = ThresholdSchedule(milestones={1: {"lower": 1}, 2: {"upper": 4}}), trainer_with(DSSP(3, 9))
    schedule.on_train_start(at_epoch(trainer, 7), MODULE)
    assert trainer.strategy.paradigm.thresholds == {"lower": 1, "upper": 4}  # type: ignore[attr-defined]


def test_thresholds_of_another_paradigm_are_left_with_a_warning() -> None:
    first = ThresholdSchedule(milestones={2: {"threshold": 8}})
    first.on_train_start(at_epoch(trainer_with(SSP(3)), 2), MODULE)
    second, trainer = ThresholdSchedule(milestones={1: {"upper": 5}, 9: {"upper": 4}}), trainer_with(DSSP(3, 15))
    second.load_state_dict(through_a_checkpoint(first))
    with pytest.warns(UserWarning, match=r"thresholds \{'threshold': 8\} are those of another paradigm"):
        second.on_train_start(at_epoch(trainer, 3), MODULE)
    assert trainer.strategy.paradigm.thresholds == {"lower": 3, "upper": 5}  # type: ignore[attr-defined]


@pytest.mark.parametrize("paradigm", [BoundedDelay(), BoundedDelay("auto")], ids=repr)
def test_a_delay_that_adapts_does_so_after_a_resume_until_the_schedule_has_set_it(paradigm: BoundedDelay) -> None:
    milestones = {3: {"delay": 5}}
    first, trainer = ThresholdSchedule(milestones=milestones), trainer_with(paradigm)
    first.on_train_start(at_epoch(trainer, 1), MODULE)
    second, resumed = ThresholdSchedule(milestones=milestones), trainer_with(paradigm)
    second.load_state_dict(through_a_checkpoint(first))
    second.on_train_start(at_epoch(resumed, 2), MODULE)
    assert repr(resumed.strategy.paradigm) == repr(paradigm)  # type: ignore[attr-defined]

    second.on_train_epoch_start(at_epoch(resumed, 3), MODULE)
    third, again = ThresholdSchedule(milestones=milestones), trainer_with(paradigm)
    third.load_state_dict(through_a_checkpoint(second))
    third.on_train_start(at_epoch(again, 4), MODULE)
    for one in (resumed, again):
        assert repr(one.strategy.paradigm) == "BoundedDelay(delay=5)"  # type: ignore[attr-defined]


def test_a_metric_sets_a_delay_that_adapts() -> None:
    schedule, trainer = ThresholdSchedule(monitor="loss", patience=1), trainer_with(BoundedDelay("auto"))
    trainer.strategy._update._note_meeting(Meeting({"delay": 12}, ((0, 1),)))  # type: ignore[attr-defined]
    schedule.on_train_start(trainer, MODULE)
    trainer._logger_connector._callback_metrics = {"loss": torch.tensor(1.0)}
    schedule._check_metric(trainer)
    assert (trainer.strategy.paradigm.adapts, schedule.state_dict()["thresholds"]) == (True, {})  # type: ignore[attr-defined]
    schedule._check_metric(trainer)
    assert repr(trainer.strategy.paradigm) == "BoundedDelay(delay=6)"  # type: ignore[attr-defined]
    assert schedule.state_dict()["thresholds"] == {"delay": 6}


# --- the strategy -------------------------------------------------------------------------------------------------


def test_set_thresholds_leaves_the_users_own_paradigm_alone() -> None:
    paradigm = SSP(3)
    strategy = StaleSyncStrategy(paradigm=paradigm)
    strategy.set_thresholds(threshold=5)
    assert (paradigm.threshold, strategy.paradigm.thresholds) == (3, {"threshold": 5})


def connect(strategy: StaleSyncStrategy, set_thresholds: Callable[[Any], None]) -> None:
    update: Any = strategy._update
    update._client = SimpleNamespace(set_thresholds=set_thresholds)
    update._training = SimpleNamespace(others=OtherRanks(strategy._require_trainer))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_tells_the_server(rank: int) -> None:
    strategy, told = StaleSyncStrategy(paradigm=DSSP(1, 5)), []
    connect(strategy, told.append)
    strategy.cluster_environment = SimpleNamespace(global_rank=lambda: rank)  # type: ignore[assignment]
    strategy.set_thresholds(upper=9)
    assert told == ([{"upper": 9}] if rank == 0 else [])
    assert strategy.paradigm.thresholds == {"lower": 1, "upper": 9 if rank == 0 else 5}
    with pytest.raises(ValueError, match=r"DSSP\(upper=-1\)"):
        strategy.set_thresholds(upper=-1)
    assert len(told) == (1 if rank == 0 else 0), "refused before anybody is told"


def test_what_the_server_refuses_changes_nothing() -> None:
    def refuse(thresholds: Any) -> None:
        raise ValueError("no")

    strategy = StaleSyncStrategy(paradigm=SSP(1))
    connect(strategy, refuse)
    with pytest.raises(ValueError, match="no"):
        strategy.set_thresholds(threshold=4)
    assert strategy.paradigm.thresholds == {"threshold": 1}
