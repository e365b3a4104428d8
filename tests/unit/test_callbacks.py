"""The callbacks: seeded slow-downs, the table of summary(), and what the monitor logs."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from lightning_stale import SSP, StalenessMonitor, StaleSyncStrategy, StragglerInjection
from lightning_stale.callbacks.monitor import summary_table
from lightning_stale.parameter_server.client import Release
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


# --- StalenessMonitor ---------------------------------------------------------------------------------------------

SUMMARY = {
    "paradigm": "SSP(threshold=2)",
    "updates": 1234,
    "phases": [{"thresholds": {"threshold": 2}, "since": 0, "max_lead": 2}],
    "workers": [
        {
            "rank": 0,
            "pushes": 800,
            "max_lead": 2,
            "mean_lead": 1.234,
            "max_staleness": 5,
            "mean_staleness": 0.987,
            "wait_s": 3.0,
            "compute_s": 9.0,
        },
        {
            "rank": 1,
            "pushes": 434,
            "max_lead": 0,
            "mean_lead": 0.0,
            "max_staleness": 7,
            "mean_staleness": 2.5,
            "wait_s": 0.0,
            "compute_s": 0.0,
        },
    ],
}


def rendered(summary: dict[str, Any]) -> list[str]:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get().splitlines()


def test_the_table_has_a_row_per_worker() -> None:
    lines = rendered(SUMMARY)
    assert "SSP(threshold=2): 1234 updates" in lines[0]
    first = next(line for line in lines if "800" in line).split()
    second = next(line for line in lines if "434" in line).split()
    assert first == ["0", "800", "1.23", "(2)", "0.99", "(5)", "3.0", "s", "25%"]
    assert second == ["1", "434", "0.00", "(0)", "2.50", "(7)", "0.0", "s", "0%"]


def test_the_table_fits_80_columns() -> None:
    lines = rendered(SUMMARY)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_table_tells_the_rule_and_what_it_refused() -> None:
    workers = [{**worker, "refused": refused} for worker, refused in zip(SUMMARY["workers"], (0, 17), strict=True)]
    lines = rendered({**SUMMARY, "apply": "Ringmaster(R=8)", "workers": workers})
    assert "SSP(threshold=2), Ringmaster(R=8): 1234 updates" in lines[0]
    assert next(line for line in lines if "rank" in line).split()[:3] == ["rank", "pushes", "refused"]
    assert next(line for line in lines if "434" in line).split()[:3] == ["1", "434", "17"]
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    plain = [{**worker, "refused": 0} for worker in SUMMARY["workers"]]
    assert rendered({**SUMMARY, "apply": "Plain()", "workers": plain}) == rendered(SUMMARY)


def test_the_table_of_nobody() -> None:
    lines = rendered({"paradigm": "ASP()", "updates": 0, "phases": [], "workers": []})
    assert "ASP(): 0 updates" in lines[0]
    assert any("rank" in line for line in lines)


def test_the_table_tells_of_changed_thresholds() -> None:
    phases = [
        {"thresholds": {"lower": 1, "upper": 9}, "since": 0, "max_lead": 8},
        {"thresholds": {"lower": 1, "upper": 4}, "since": 700, "max_lead": 3},
    ]
    text = "\n".join(rendered({**SUMMARY, "phases": phases}))
    assert "from update 0: lower=1, upper=9, largest lead 8" in text
    assert "from update 700: lower=1, upper=4, largest lead 3" in text
    assert "from update" not in "\n".join(rendered(SUMMARY))


def quiet_trainer(strategy: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)


def test_the_monitor_refuses_other_strategies() -> None:
    trainer = quiet_trainer("auto")
    with pytest.raises(MisconfigurationException, match="SingleDeviceStrategy has neither") as error:
        StalenessMonitor().setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert "write Trainer(strategy='dssp'), or leave the monitor out" in str(error.value)


class Recorder:
    """A module that notes what is logged."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], dict[str, Any]]] = []

    def log_dict(self, values: dict[str, float], **options: Any) -> None:
        self.calls.append((values, options))


@pytest.mark.parametrize("prog_bar", [True, False])
def test_the_monitor_logs_the_last_ok(clock: SimpleNamespace, prog_bar: bool) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    trainer = quiet_trainer(strategy)
    monitor, module = StalenessMonitor(prog_bar=prog_bar), Recorder()
    monitor.setup(trainer, module, "fit")  # type: ignore[arg-type]
    batch = torch.zeros(32, 4)

    monitor.on_train_batch_start(trainer, module, batch, 0)  # type: ignore[arg-type]
    monitor.on_train_batch_end(trainer, module, None, batch, 0)  # type: ignore[arg-type]
    assert module.calls == [], "there was no OK yet"

    release = Release(version=9, clock=4, lead=2, staleness=3, wait_s=0.5, compute_s=1.5)
    strategy._update._client = SimpleNamespace(last_release=release)  # type: ignore[assignment]
    monitor.on_train_batch_start(trainer, module, batch, 1)  # type: ignore[arg-type]
    clock.now += 2.0
    monitor.on_train_batch_end(trainer, module, None, batch, 1)  # type: ignore[arg-type]
    (values, options), (bounds, further) = module.calls
    assert (bounds, further.get("prog_bar", False)) == ({"staleness/threshold": 2.0}, False)
    assert values == {
        "staleness/lead": 2.0,
        "staleness/gradient": 3.0,
        "staleness/wait_share": 0.25,
        "staleness/samples_per_s": 16.0,
    }
    assert options == {"on_step": True, "on_epoch": False, "prog_bar": prog_bar, "batch_size": 1}

    module.calls.clear()
    monitor.on_train_batch_end(trainer, module, None, object(), 2)  # type: ignore[arg-type]
    (values, _), _ = module.calls
    assert "staleness/samples_per_s" not in values, "the size of such a batch is not known"


@pytest.mark.parametrize("applied", [True, False])
def test_the_monitor_logs_what_the_rule_refused(clock: SimpleNamespace, applied: bool) -> None:
    strategy = StaleSyncStrategy(paradigm="asp", apply="ringmaster")
    trainer, module = quiet_trainer(strategy), Recorder()
    release = Release(version=9, clock=4, lead=2, staleness=3, wait_s=0.5, compute_s=1.5, applied=applied)
    strategy._update._client = SimpleNamespace(last_release=release)  # type: ignore[assignment]
    StalenessMonitor().on_train_batch_end(trainer, module, None, torch.zeros(1), 0)  # type: ignore[arg-type]
    assert module.calls[-1][0] == {"staleness/refused": float(not applied)}


@pytest.mark.parametrize("print_summary", [True, False])
def test_the_table_is_printed_at_the_end_if_wanted(print_summary: bool, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    trainer = quiet_trainer(strategy)
    strategy._summary = SUMMARY
    StalenessMonitor(print_summary=print_summary).on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert ("SSP(threshold=2): 1234 updates" in capsys.readouterr().out) is print_summary


def test_a_factor_of_a_rank_that_is_not_there_is_refused() -> None:
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0)
    StragglerInjection(factors={0: 2.0, 1: 2.0}).setup(trainer, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"no rank 2 among 2; write ranks from 0 to 1, or.*devices=3"):
        StragglerInjection(factors={2: 2.0}).setup(trainer, None, "fit")  # type: ignore[arg-type]
