"""Real runs beside their simulation: throughput and share of waiting, four workers and four stages.

A step takes 100 ms of an emulated accelerator (a layer that sleeps), so that four workers run in parallel on two cores;
messages, copies, locks, the server and Lightning are real. First all are equal, then rank 0 is 2.3 times slower.
Each run logs how long its steps took, and each is simulated twice:

- from its own log: is what happens to the workers right?
- from the log of the asp run alone: what is predicted of a paradigm before it has been tried.

What an exchange takes is the mean wait in the asp run of that case, where nobody waits for others; HPSGD's all-reduce
is timed alone, when the workers have just started, and the end of a round is the median wait in the hpsgd run.

Then four stages of DSP, 20 ms forward and 40 ms backward, in four processes: all equal, and one 1.5 times slower. They
are simulated from their own log; what a message takes is the mean time from when it was sent and asked for to when it
was there.

    python benchmarks/simulation.py [--steps 100] [--step-ms 100] [--batches 40] [--repetitions 3]
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
from simulated_pipeline import WORKERS, compared_pipelines, everyone, fit, rank, train_pipeline

from lightning_stale import BoundedDelay, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.simulation import AveragingSetting, Cluster, StepTimes, parse_setting, run

SLOW_FACTOR = 2.3
RESULTS = Path(__file__).parent / "results"
SETTINGS = ["asp", "bsp", "ssp:3", "dssp:3:15", "asp@on-demand", "ssp:3@on-demand"]
SETTINGS += ["bounded-delay:4", "bounded-delay:8", "hpsgd", "hpsgd:4", "hpsgd@on-demand"]
PIPELINES = ["bp", "minimal@no-recompute", "dsp", "dsp@no-recompute"]
PARAMETERS = 1_100_000  # of Emulated


class Log(L.Callback):
    """Keeps how long this worker computed in each step, how long it waited after it, and when it was."""

    def __init__(self) -> None:
        self.compute_s: list[float] = []
        self.wait_s: list[float] = []
        self.began = self.ended = self.since = self.computed = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = self.began or time.monotonic()
        self.since = self.since or self.began

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.computed = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ended = time.monotonic()
        if isinstance(trainer.strategy, StaleSyncStrategy):
            times = trainer.strategy.last_release.compute_s, trainer.strategy.last_release.wait_s
        else:  # HPSGD: the callback that ends rounds comes before this one
            times = self.computed - self.since, self.ended - self.computed
        self.since = self.ended
        self.compute_s.append(times[0])
        self.wait_s.append(times[1])


def train(name: str, step_s: float, steps: int, slow: bool) -> list[dict[str, Any]]:
    """Train an epoch; return what each worker has logged."""
    setting = parse_setting(name)
    strategy: Any
    if isinstance(setting, AveragingSetting):
        strategy = HPSGDStrategy(interval=setting.interval, data=setting.data)
    else:
        paradigm = setting.make()
        given = {} if isinstance(paradigm, BoundedDelay) else {"data": setting.data}
        strategy = StaleSyncStrategy(paradigm=paradigm, **given)
    samples = BATCH * steps * WORKERS
    log = Log()
    model = Emulated(step_s * (SLOW_FACTOR if slow and rank() == 0 else 1.0))
    fit(strategy, model, (torch.randn(samples, WIDTH), torch.zeros(samples).long()), BATCH, [log])
    return everyone({name: getattr(log, name) for name in ("compute_s", "wait_s", "began", "ended")})


def all_reduce_s() -> float:
    """Return how long an all-reduce of the gradients takes, with nothing beside it."""
    tensor, times = torch.zeros(PARAMETERS), []
    for _ in range(20):
        torch.distributed.barrier()
        began = time.monotonic()
        torch.distributed.all_reduce(tensor)
        times.append(time.monotonic() - began)
    return statistics.median(times)


def _run(arguments: argparse.Namespace) -> None:
    """In every worker process."""
    quiet()
    runs: list[dict[str, Any]] = []
    pipelines: list[dict[str, Any]] = []
    ring_s = 0.0
    for _ in range(arguments.repetitions):
        for slow in (False, True):
            for name in SETTINGS:
                logs = train(name, arguments.step_ms / 1e3, arguments.steps, slow)
                ring_s = ring_s or all_reduce_s()
                runs.append({"slow": slow, "setting": name, "logs": logs, "load": os.getloadavg()[0]})
                _say(runs[-1])
            for name in PIPELINES:
                logs = train_pipeline(name, arguments.batches, slow)
                pipelines.append({"slow": slow, "setting": name, "logs": logs, "load": os.getloadavg()[0]})
                _say(pipelines[-1])
    if rank() == 0:
        Path(arguments.json).write_text(json.dumps([ring_s, runs, pipelines]))


def _say(one: dict[str, Any]) -> None:
    if rank() == 0:
        print(time.strftime("%X"), one["setting"], "one slow" if one["slow"] else "", flush=True)


def real(logs: list[dict[str, Any]], batches: int) -> dict[str, float]:
    """Return batches per second, and the share of time in which workers did not compute."""
    seconds = max(log["ended"] for log in logs) - min(log["began"] for log in logs)
    computed = sum(sum(log["compute_s"]) for log in logs)
    return {"rate": batches / seconds, "waiting": 1 - computed / (seconds * WORKERS)}


def times_of(name: str, logs: list[dict[str, Any]]) -> StepTimes:
    """Return the logs."""
    return StepTimes(name, tuple(tuple(log["compute_s"]) for log in logs))


def compared(steps: int, ring_s: float, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per run of workers: real, and simulated from two logs."""
    rows: list[dict[str, Any]] = []
    log_of_asp: dict[bool, tuple[StepTimes, float]] = {}
    round_s: dict[bool, float] = {}
    for one in runs:
        slow, name, logs = one["slow"], one["setting"], one["logs"]
        if name == "asp":  # the first of each repetition
            waits = [wait for log in logs for wait in log["wait_s"]]
            log_of_asp[slow] = times_of("asp", logs), statistics.fmean(waits)
        asp, exchange_s = log_of_asp[slow]
        row = {"slow": slow, "setting": name, "load": one["load"], "real": real(logs, steps * WORKERS)}
        row["compute_s"] = [statistics.fmean(log["compute_s"]) for log in logs]
        row["exchange_s"] = exchange_s
        cluster = Cluster(exchange_s=exchange_s, all_reduce_s=ring_s)
        if name == "hpsgd":  # the first of its kind: each step ends a round, and nobody waits
            round_s[slow] = statistics.median(wait for log in logs for wait in log["wait_s"])
        if name.startswith("hpsgd"):
            cluster = Cluster(all_reduce_s=ring_s, update_s=round_s[slow])
        for key, times in (("own log", times_of(name, logs)), ("asp's log", asp)):
            outcome = run(parse_setting(name), times, cluster, steps=steps)
            row[key] = {"rate": outcome.rate, "waiting": outcome.waiting}
        rows.append(row)
    return rows


def main() -> None:
    """Measure, simulate, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--batches", type=int, default=40, help="of a pipeline")
    parser.add_argument("--json", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        _run(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logs.json"
        command = [sys.executable, __file__, "--json", str(path)]
        command += ["--repetitions", str(arguments.repetitions), "--steps", str(arguments.steps)]
        command += ["--step-ms", str(arguments.step_ms), "--batches", str(arguments.batches)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ring_s, runs, pipelines = json.loads(path.read_text())
    workers, stages = compared(arguments.steps, ring_s, runs), compared_pipelines(arguments.batches, pipelines)
    table = Table(title=f"{WORKERS} workers, {arguments.step_ms:.0f} ms a step, {arguments.steps} steps each: medians")
    for heading in ("", "batches/s", "own log", "asp's log", "waiting", "own log", "asp's log"):
        table.add_column(heading, justify="right" if heading else "left")
    for rows, names in ((workers, SETTINGS), (stages, PIPELINES)):
        for slow in (False, True):
            for name in names:
                mine = [row for row in rows if (row["slow"], row["setting"]) == (slow, name)]
                table.add_row(f"{name}{', one slow' if slow else ''}", *_cells(mine))
        table.add_section()
    Console(width=100).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": table.title,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "all_reduce_s": ring_s,
        "rows": workers,
        "pipelines": stages,
    }
    (RESULTS / "simulation.json").write_text(json.dumps(content, indent=1) + "\n")


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for what, shown in (("rate", "{:.1f}"), ("waiting", "{:.1%}")):
        cells.append(shown.format(statistics.median(row["real"][what] for row in rows)))
        for key in ("own log", "asp's log"):
            if key not in rows[0]:
                cells.append("")
            elif what == "rate":
                cells.append(f"{statistics.median(row[key][what] / row['real'][what] - 1 for row in rows):+.1%}")
            else:
                cells.append(f"{statistics.median(row[key][what] - row['real'][what] for row in rows) * 100:+.1f} pt")
    return cells


if __name__ == "__main__":
    main()
