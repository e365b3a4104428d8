"""What StalenessMonitor logs, prints and writes: from counts alone, without processes."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_stale import SSP, DSPStrategy, HPSGDStrategy, StalenessMonitor, StaleSyncStrategy
from lightning_stale.callbacks.monitoring import file, meter_of
from lightning_stale.callbacks.monitoring.histograms import log_histograms
from lightning_stale.callbacks.monitoring.table import summary_table
from lightning_stale.events import Elapsed, Exchanged, Received, RoundEnded, Sent, Spent, StageRan, Stepped
from lightning_stale.events.averaging import AveragingCounts
from lightning_stale.events.pipeline import StageCounts, of_all_ranks
from lightning_stale.parameter_server.client import Release
from lightning_stale.pipeline.channels.channel import MemoryChannel
from tests.integration.models import Regression, loader

# --- the table --------------------------------------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
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
            "leases": 0,
            "taken_back": 0,
            "leads": {0: 300, 1: 13, 2: 487},
            "staleness": {0: 400, 1: 399, 5: 1},
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
            "leases": 0,
            "taken_back": 0,
            "leads": {0: 434},
            "staleness": {1: 2, 7: 432},
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


ROUNDS = {
    "paradigm": "HPSGDStrategy(interval='auto', merge='hpsgd')",
    "updates": 40,
    "workers": [
        {
            "rank": rank,
            "steps": 100_000,
            "rounds": 40,
            "steps_per_round": 2500.0,
            "hidden": 0.25 + rank / 2,
            "wait_s": 100_000.0,
            "compute_s": 300_000.0,
        }
        for rank in (0, 1)
    ],
}


def pipeline_counts() -> StageCounts:
    counts = StageCounts()
    for stage in (0, 1):
        for batch in range(4):
            counts.note(Received(0.0, stage, batch, "gradients", wait_s=0.5, queued=batch))
            counts.note(StageRan(0.0, stage, batch, "forward", busy_s=1.0 + stage))
            counts.note(StageRan(0.0, stage, batch, "evaluation", busy_s=100.0))
            counts.note(Sent(0.0, stage, batch, "features", wait_s=0.25))
    counts.note(Elapsed(0.0, elapsed_s=16.0))
    return counts


def pipeline_summary(parameters: int = 100) -> dict[str, Any]:
    rows = of_all_ranks([{"stage": k, "parameters": parameters} for k in range(3)], [pipeline_counts().summary()])
    return {"staleness": (4, 2, 0), "stages": rows}


def test_what_is_counted_of_stages() -> None:
    """Evaluation is left out; a stage of which nothing is known has no queues."""
    first, second, third = pipeline_summary()["stages"]
    assert first == {
        "stage": 0,
        "parameters": 100,
        "busy_s": 4.0,
        "utilisation": 0.25,
        "wait_features_s": 0.0,
        "wait_gradients_s": 2.0,
        "wait_to_send_s": 1.0,
        "features_queued": None,
        "gradients_queued": 1.5,
    }
    assert second["utilisation"] == 0.5
    assert (third["busy_s"], third["gradients_queued"]) == (0.0, None)


def test_a_channel_says_how_much_waits_in_it() -> None:
    channel = MemoryChannel()
    for batch in range(3):
        channel.send(batch, "features")
    channel.receive(0)
    assert channel.queued() == 2


@pytest.mark.parametrize(
    "summary",
    [
        SUMMARY,
        {**SUMMARY, "workers": [{**SUMMARY["workers"][0], "pushes": 9_999_999, "wait_s": 99_999.9}] * 99},
        ROUNDS,
        pipeline_summary(999_999),
        pipeline_summary(123_456_789_012),
        HPSGDStrategy().summary(),
        StaleSyncStrategy().summary(),
        DSPStrategy(stages=2).summary(),
    ],
    ids=range(8),
)
def test_tables_of_all_strategies_fit_80_columns(summary: dict[str, Any]) -> None:
    lines = rendered(summary)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_table_of_rounds() -> None:
    lines = rendered(ROUNDS)
    assert next(line for line in lines if "75%" in line).split() == [
        *("1", "100000", "40", "2500.00", "75%", "100000", "s", "25%")
    ]


def test_the_table_of_stages() -> None:
    lines = rendered(pipeline_summary(1_234_567))
    assert next(line for line in lines if "25%" in line).split() == [
        *("0", "1.2", "M", "4.0", "25%", "0.0", "2.0", "1.5", "1.0")
    ]


# --- what is logged ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only the test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def quiet_trainer(strategy: Any, **options: Any) -> Trainer:
    options = {"logger": False, "enable_checkpointing": False, **options}
    return Trainer(accelerator="cpu", devices=1, strategy=strategy, **options)


class Module:
    """Notes what is logged."""

    automatic_optimization = True

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], dict[str, Any]]] = []

    def log_dict(self, values: dict[str, float], **options: Any) -> None:
        self.calls.append((values, options))


class Monitored:
    """A monitor whose hooks are called by hand."""

    def __init__(self, strategy: Any, clock: SimpleNamespace, **options: Any) -> None:
        self.clock, self.module, self.monitor = clock, Module(), StalenessMonitor(**options)
        self.trainer = quiet_trainer(strategy, log_every_n_steps=1)
        self.trainer.strategy._lightning_module = self.module  # type: ignore[assignment]
        self.monitor.setup(self.trainer, self.module, "fit")  # type: ignore[arg-type]

    def batch(self, batch: Any = None, seconds: float = 2.0, during: Any = lambda: None) -> dict[str, float]:
        """One batch; return what is logged after it."""
        batch = torch.zeros(32, 4) if batch is None else batch
        self.module.calls.clear()
        self.monitor.on_train_batch_start(self.trainer, self.module, batch, 0)  # type: ignore[arg-type]
        self.clock.now += seconds
        during()
        self.monitor.on_train_batch_end(self.trainer, self.module, None, batch, 0)  # type: ignore[arg-type]
        assert [options for _, options in self.module.calls] in (
            [],
            [{"on_step": True, "on_epoch": False, "batch_size": 1}],
        )
        return self.module.calls[0][0] if self.module.calls else {}


def release(**fields: Any) -> Release:
    return Release(**{"version": 9, "clock": 4, "lead": 2, "staleness": 3, "wait_s": 0.5, "compute_s": 1.5, **fields})


def test_the_monitor_refuses_other_strategies() -> None:
    trainer = quiet_trainer("auto")
    with pytest.raises(MisconfigurationException, match="SingleDeviceStrategy counts nothing of it") as error:
        StalenessMonitor().setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert "write Trainer(strategy='dssp'), or another one of lightning_stale, or leave the monitor" in str(error.value)


def test_the_monitor_logs_the_last_ok(clock: SimpleNamespace) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    assert Monitored(StaleSyncStrategy(paradigm=SSP(2)), clock).batch() == {}, "there was no OK yet"
    monitored = Monitored(strategy, clock)
    strategy._update._client = SimpleNamespace(last_release=release())  # type: ignore[assignment]
    assert monitored.batch() == {
        "staleness/lead": 2.0,
        "staleness/gradient": 3.0,
        "staleness/wait_share": 0.25,
        "staleness/samples_per_s": 16.0,
        "staleness/threshold": 2.0,
    }
    assert monitored.monitor._meter.line() == {"lead": "2, late 3, wait 25%"}  # type: ignore[union-attr]
    assert monitored.batch() == {}, "amid a step of several batches"
    strategy._update._client.last_release = release(clock=5)  # type: ignore[union-attr]
    values = monitored.batch(object())
    assert "staleness/samples_per_s" not in values, "the size of such a batch is not known"
    assert "staleness/threshold" not in values, "it is as before"
    client, strategy._update._client = strategy._update._client, None
    strategy.set_thresholds(threshold=1)
    client.last_release = release(clock=6)  # type: ignore[union-attr]
    strategy._update._client = client
    assert monitored.batch()["staleness/threshold"] == 1.0


def test_between_two_logs_are_means(clock: SimpleNamespace) -> None:
    strategy = StaleSyncStrategy(paradigm="asp", apply="ringmaster")
    monitored = Monitored(strategy, clock)
    monitored.trainer.log_every_n_steps = 4  # type: ignore[attr-defined]
    for n, applied in enumerate((True, False, False)):
        oks = release(clock=n, lead=n, staleness=2 * n, wait_s=1.0, compute_s=n, applied=applied)
        strategy._update._client = SimpleNamespace(last_release=oks)  # type: ignore[assignment]
        assert monitored.batch() == {}
    monitored.trainer.fit_loop.epoch_loop._batches_that_stepped = 3
    strategy._update._client = SimpleNamespace(last_release=release(clock=3))  # type: ignore[assignment]
    values = monitored.batch()
    assert values == {
        "staleness/lead": (0 + 1 + 2 + 2) / 4,
        "staleness/gradient": (0 + 2 + 4 + 3) / 4,
        "staleness/wait_share": 3.5 / (3.5 + 0 + 1 + 2 + 1.5),
        "staleness/refused": 0.5,
        "staleness/samples_per_s": 16.0,
    }


def test_what_is_logged_of_all_workers(clock: SimpleNamespace) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    monitored = Monitored(strategy, clock)
    for n in range(2):  # of this worker: two batches of 32 samples each, two pushes
        strategy._update._client = SimpleNamespace(last_release=release(clock=n))  # type: ignore[assignment]
        monitored.batch()
    strategy._update._client = None
    summary = {**SUMMARY, "taken_back": 1, "workers": [{**worker, "leases": 9} for worker in SUMMARY["workers"]]}
    summary["workers"][1] |= {"wait_s": 1.0, "compute_s": 30.0}
    strategy._summary = summary
    monitored.module.calls.clear()
    monitored.monitor.on_train_epoch_end(monitored.trainer, monitored.module)  # type: ignore[arg-type]
    ((values, options),) = monitored.module.calls
    assert options == {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True, "rank_zero_only": True}
    assert values == {
        "staleness/all/updates": 1234.0,
        "staleness/all/lead": (1.234 + 0) / 2,
        "staleness/all/max_lead": 2.0,
        "staleness/all/gradient": (0.987 + 2.5) / 2,
        "staleness/all/max_gradient": 7.0,
        "staleness/all/wait_share": 4 / (4 + 39),
        "staleness/all/samples_per_s": 32 * (800 / 12 + 434 / 31),
        "staleness/all/leases": 18.0,
        "staleness/all/taken_back": 1.0,
    }


def test_rounds_are_logged_when_they_have_ended(clock: SimpleNamespace) -> None:
    strategy = HPSGDStrategy()
    monitored = Monitored(strategy, clock)
    strategy._counts = AveragingCounts()  # as a fit makes it, after setup

    def happens(*kinds: Any) -> Any:
        return lambda: [strategy.counts.note(event) for event in kinds]

    assert monitored.batch(during=happens(Stepped(0.0))) == {}
    ended = (Stepped(0.0), Stepped(0.0), Exchanged(0.0, exchange_s=2.0, wait_s=0.5), RoundEnded(0.0))
    values = monitored.batch(during=happens(*ended))
    assert values == {
        "staleness/steps_per_round": 3.0,
        "staleness/hidden": 0.75,
        "staleness/wait_share": 0.5 / 4,  # of two batches of 2 s
        "staleness/samples_per_s": 16.0,
    }
    values = monitored.batch(during=happens(Stepped(0.0)))
    assert values["staleness/steps_per_round"] == 3.0, "the round goes on"
    assert values["staleness/wait_share"] == 0.0
    values = monitored.batch(during=happens(*ended[1:]))
    assert values["staleness/steps_per_round"] == 2.0
    assert monitored.monitor._meter.line() == {"hidden": "75%, 2.0 steps"}  # type: ignore[union-attr]
    strategy.counts.note(Spent(0.0, 0, wait_s=0.0, compute_s=1.0))
    meter = meter_of(strategy)
    assert meter is not None
    assert meter.of_all(ROUNDS) == {"rounds": 40.0, "steps_per_round": 2500.0, "hidden": 0.5, "wait_share": 0.25}


def test_stages_are_logged(clock: SimpleNamespace) -> None:
    """What happens between batches, such as a drain, is not part of one."""
    strategy = DSPStrategy(stages=2)
    monitored = Monitored(strategy, clock)
    strategy._counts = pipeline_counts()

    def happens() -> None:
        strategy.counts.note(StageRan(0.0, 1, 0, "forward", busy_s=1.0))
        strategy.counts.note(Received(0.0, 1, 0, "features", wait_s=0.5, queued=0))
        strategy.counts.note(Sent(0.0, 1, 0, "gradients", wait_s=0.25))

    values = monitored.batch(during=happens)
    assert values == {
        "staleness/utilisation": 0.5,
        "staleness/wait_features": 0.25,
        "staleness/features_queued": 0.0,
        "staleness/samples_per_s": 16.0,
    }
    meter = meter_of(strategy)
    assert meter is not None
    logged = meter.of_all(pipeline_summary())
    assert (logged["stage0/utilisation"], logged["stage0/gradients_queued"]) == (0.25, 1.5)
    assert "stage0/features_queued" not in logged


# --- the progress bar -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_line_in_the_progress_bar_while_fit_runs(bar: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A real fit, with virtual stages, so without a process; the bar is as it was afterwards."""
    monitor, own = StalenessMonitor(), bar()
    shown = []

    class Look(type(own)):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            shown.append(self.get_metrics(trainer, pl_module))

    look = Look()
    options = {"max_epochs": 1, "default_root_dir": tmp_path, "enable_model_summary": False}
    trainer = quiet_trainer(DSPStrategy(stages=2), callbacks=[look, monitor], **options)
    trainer.fit(Regression(), loader(samples=32))
    assert re.fullmatch(r"\d+%, wait \d+%", shown[-1]["busy"])
    assert "get_metrics" not in vars(look)
    written = "".join(capsys.readouterr()).replace("=", ": ")
    assert re.search(r"busy: \d+%, wait", written)
    without = StalenessMonitor(prog_bar=False)
    without.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert "get_metrics" not in vars(look)


# --- histograms -------------------------------------------------------------------------------------------------------

COUNTS = {0: 5, 1: 3, 4: 1, 70: 2}


def test_a_histogram_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_histograms([CSVLogger(tmp_path / "csv"), logger], {"lead": COUNTS, "nothing": {}}, step=7)
    logger.finalize("success")
    board = EventAccumulator(logger.log_dir)
    board.Reload()
    assert board.Tags()["histograms"] == ["lead"]
    (event,) = board.Histograms("lead")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.min, value.max) == (7, 11, 3 + 4 + 140, 0, 70)
    assert sum(value.bucket) == 11


class WandbLogger:
    """By its name one of Lightning's, or of a subclass."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.experiment = SimpleNamespace(log=self.logged.append)


class OfTheUser(WandbLogger):
    pass


def test_a_histogram_in_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """``wandb.Histogram(np_histogram=(counts, edges))`` wants one more edge than counts, and at most 512 of these."""

    class Histogram:
        def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
            self.counts, self.edges = np_histogram
            assert len(self.edges) == len(self.counts) + 1
            assert len(self.counts) <= 512

    wandb = ModuleType("wandb")
    wandb.Histogram = Histogram  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger: Any = OfTheUser()
    log_histograms([logger], {"lead": {1: 3, 3: 1}, "far": {0: 1, 2**40: 2}}, step=7)
    (lead, far) = logger.logged
    assert (lead["lead"].counts, lead["lead"].edges) == ([3, 0, 1], [1, 2, 3, 4])
    assert lead["trainer/global_step"] == 7
    assert (sum(far["far"].counts), far["far"].edges[-1] > 2**40) == (3, True)


# --- the end of fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
def test_the_table_is_printed_at_the_end_if_wanted(
    wanted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    trainer = quiet_trainer(strategy, default_root_dir=tmp_path)
    strategy._summary = SUMMARY
    StalenessMonitor(print_summary=wanted, save_summary=False).on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert ("SSP(threshold=2): 1234 updates" in capsys.readouterr().out) is wanted
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_the_numbers_of_the_summary_and_no_fit_overwrites_another(tmp_path: Path) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    strategy._summary = SUMMARY
    trainer = quiet_trainer(strategy, default_root_dir=tmp_path / "root")
    monitor = StalenessMonitor(print_summary=False)
    for _ in range(2):
        monitor.on_fit_end(trainer, None)  # type: ignore[arg-type]
    trainer.loggers = [CSVLogger(tmp_path / "logs", name="csv")]
    monitor.on_fit_end(trainer, None)  # type: ignore[arg-type]
    places = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert places == ["logs/csv/version_0/staleness.json", "root/staleness-v1.json", "root/staleness.json"]
    written = json.loads((tmp_path / "root" / "staleness.json").read_text())
    assert written == {
        "strategy": "StaleSyncStrategy",
        "world_size": 1,
        "epochs": 0,
        "steps": 0,
        "summary": json.loads(json.dumps(SUMMARY)),
    }


def test_a_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(2))
    trainer = quiet_trainer(strategy, default_root_dir=tmp_path, fast_dev_run=True)
    strategy._summary = SUMMARY
    StalenessMonitor(print_summary=False).on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(StaleSyncStrategy(), default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    StalenessMonitor().on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_logger_without_a_folder_leaves_the_trainers(tmp_path: Path) -> None:
    trainer = quiet_trainer("auto", default_root_dir=tmp_path)
    trainer.loggers = [WandbLogger()]  # type: ignore[list-item]
    assert file.folder_of(trainer) == str(tmp_path)
