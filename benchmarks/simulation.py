"""Real runs of four workers beside their simulation: throughput and share of waiting.

A step takes 100 ms of an emulated accelerator (a layer that sleeps), so that four workers run in parallel on two cores;
messages, copies, locks, the server and Lightning are real. First all are equal, then rank 0 is 2.3 times slower.
Each run logs how long its steps took (``strategy.last_release.compute_s``), and each is simulated twice:

- from its own log: is what happens to the workers right?
- from the log of the asp run alone: what is predicted of a paradigm before it has been tried.

What an exchange takes is the mean wait in the asp run of that case, where nobody waits for others.

    python benchmarks/simulation.py [--steps 100] [--step-ms 100] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from emulated import BATCH, WIDTH, Emulated, quiet
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import BoundedDelay, StaleSyncStrategy
from lightning_stale.simulation import Cluster, Outcome, Setting, StepTimes, run

WORKERS, SLOW_FACTOR = 4, 2.3
RESULTS = Path(__file__).parent / "results"
SETTINGS = ["asp", "bsp", "ssp:3", "dssp:3:15", "asp@on-demand", "ssp:3@on-demand"]
SETTINGS += ["bounded-delay:4", "bounded-delay:8"]


class Log(L.Callback):
    """Keeps how long this worker computed before each push, how long it waited after it, and when it was."""

    def __init__(self) -> None:
        self.compute_s: list[float] = []
        self.wait_s: list[float] = []
        self.began = self.ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = self.began or time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ended = time.monotonic()
        self.compute_s.append(trainer.strategy.last_release.compute_s)
        self.wait_s.append(trainer.strategy.last_release.wait_s)


def train(name: str, step_s: float, steps: int, slow: bool) -> list[dict[str, Any]]:
    """Train an epoch; return what each worker has logged."""
    setting = Setting.parse(name)
    paradigm = setting.make()
    data = "on-demand" if setting.data == "on-demand" else "shards"
    given = {} if isinstance(paradigm, BoundedDelay) else {"data": data}
    samples = BATCH * steps * WORKERS
    log = Log()
    L.Trainer(
        strategy=StaleSyncStrategy(paradigm=paradigm, **given),
        accelerator="cpu",
        devices=WORKERS,
        max_epochs=1,
        callbacks=[log],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        Emulated(step_s * (SLOW_FACTOR if slow and os.environ.get("LOCAL_RANK", "0") == "0" else 1.0)),
        DataLoader(TensorDataset(torch.randn(samples, WIDTH), torch.zeros(samples).long()), batch_size=BATCH),
    )
    everyone: list[Any] = [None] * WORKERS
    mine = {"compute_s": log.compute_s, "wait_s": log.wait_s, "began": log.began, "ended": log.ended}
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _run(arguments: argparse.Namespace) -> None:
    """In every worker process."""
    quiet()
    results = []
    for _ in range(arguments.repetitions):
        for slow in (False, True):
            results += [(slow, name, train(name, arguments.step_ms / 1e3, arguments.steps, slow)) for name in SETTINGS]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(arguments.json).write_text(json.dumps(results))


def real(logs: list[dict[str, Any]], batches: int) -> dict[str, float]:
    """Return batches per second, and the share of time in which workers did not compute."""
    seconds = max(log["ended"] for log in logs) - min(log["began"] for log in logs)
    computed = sum(sum(log["compute_s"]) for log in logs)
    return {"rate": batches / seconds, "waiting": 1 - computed / (seconds * WORKERS)}


def times_of(name: str, logs: list[dict[str, Any]]) -> StepTimes:
    """Return the logs as far as all have got."""
    shortest = min(len(log["compute_s"]) for log in logs)
    return StepTimes(name, tuple(tuple(log["compute_s"][:shortest]) for log in logs))


def simulated(name: str, times: StepTimes, exchange_s: float, steps: int) -> Outcome:
    """Simulate what :func:`train` does."""
    return run(Setting.parse(name), times, Cluster(exchange_s=exchange_s), steps=steps)


def main() -> None:
    """Measure, simulate, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        _run(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logs.json"
        command = [sys.executable, __file__, "--json", str(path)]
        command += ["--repetitions", str(arguments.repetitions), "--steps", str(arguments.steps)]
        command += ["--step-ms", str(arguments.step_ms)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        runs = json.loads(path.read_text())
    _report(arguments.step_ms, arguments.steps, runs)


def _report(step_ms: float, steps: int, runs: list[tuple[bool, str, list[dict[str, Any]]]]) -> None:
    rows: list[dict[str, Any]] = []
    log_of_asp: dict[bool, tuple[StepTimes, float]] = {}
    for slow, name, logs in runs:
        if name == "asp":  # the first of each repetition
            waits = [wait for log in logs for wait in log["wait_s"]]
            log_of_asp[slow] = times_of("asp", logs), statistics.fmean(waits)
        asp, exchange_s = log_of_asp[slow]
        row: dict[str, Any] = {"slow": slow, "setting": name, "real": real(logs, steps * WORKERS)}
        for key, times in (("own log", times_of(name, logs)), ("asp's log", asp)):
            outcome = simulated(name, times, exchange_s, steps)
            row[key] = {"rate": outcome.rate, "waiting": outcome.waiting}
        rows.append(row)
    table = Table(title=f"{WORKERS} workers, {step_ms:.0f} ms a step, {steps} steps each: medians")
    for heading in ("", "steps/s", "own log", "asp's log", "waiting", "own log", "asp's log"):
        table.add_column(heading, justify="right" if heading else "left")
    for slow in (False, True):
        for name in SETTINGS:
            mine = [row for row in rows if (row["slow"], row["setting"]) == (slow, name)]
            rate = statistics.median(row["real"]["rate"] for row in mine)
            waiting = statistics.median(row["real"]["waiting"] for row in mine)
            cells = [f"{rate:.1f}"]
            cells += [
                f"{statistics.median(row[key]['rate'] / row['real']['rate'] - 1 for row in mine):+.1%}"
                for key in ("own log", "asp's log")
            ]
            cells += [f"{waiting:.1%}"]
            cells += [
                f"{statistics.median(row[key]['waiting'] - row['real']['waiting'] for row in mine) * 100:+.1f} pt"
                for key in ("own log", "asp's log")
            ]
            table.add_row(f"{name}{', one slow' if slow else ''}", *cells)
    Console(width=100).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": table.title,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "rows": rows,
    }
    (RESULTS / "simulation.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
