"""Samples per second of four workers, beside what each of them would do alone, and DDP, in the same run.

A step takes 20 ms of an emulated accelerator: a layer that sleeps 7 ms in the forward and 13 ms in the backward pass.
So four workers run in parallel on two cores, while 1.1 M parameters, messages, copies, the optimizer and Lightning
stay real. Where workers differ for good, a step takes 100 ms: what is asked there is who waits for whom, and of a step
of 20 ms a tenth is waiting for one of two cores, whatever the strategy. An epoch is measured, from the end of the
warm-up to the end of the last worker's last batch:

- equal: all workers are;
- unequal: rank 0 is 2.3 times slower, for good;
- hiccups: each is 5 times slower in 15 % of its steps, all in the same number of them;
- se, ar: the step times of two real jobs (recipes/traces/README.md), scaled to 100 ms: jitter of every step, and one
  worker slow for good. The layer takes half of a usual step, StragglerInjection the rest.

Local SGD is Lightning's own (PostLocalSGD, which averages the models every 4 steps). "own rates" are those of one
worker in a process of its own with nobody beside it, added up; "side by side" are four such trainers at once, which
exchange nothing: what these cores can do. "waiting" is the part of the workers' time that their steps, as long as they
take alone, do not account for.

    python benchmarks/workers.py [--repetitions 5] [--steps 100] [--cases equal ...] [--strategies ddp ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from emulated import BATCH, WARM_UP, LocalSGD, epoch, quiet
from report import Row, report
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_stale import StaleSyncStrategy, StepTrace, StragglerInjection
from recipes.traces import real_job

WORKERS, SLOW_FACTOR = 4, 2.3
STEP_S = {"equal": 0.020, "unequal": 0.100, "hiccups": 0.020, "se": 0.100, "ar": 0.100}
SCALES = {"se": STEP_S["se"] / 6.1, "ar": STEP_S["ar"] / 20.0}  # of the median step
TRACED = ("hiccups", *SCALES)
CASES = {
    "equal": "equal workers, 20 ms a step",
    "unequal": f"workers, 100 ms a step, one {SLOW_FACTOR} times slower",
    "hiccups": "workers, each 5 times slower in 15 % of its steps",
    "se": "workers of SE: jitter in every step",
    "ar": "workers of AR: one slow for good",
}
ALONE, LIMIT = "side by side", "sum of the workers' own rates"


def server(paradigm: str, data: str) -> Callable[[], StaleSyncStrategy]:
    """Return what makes the strategy anew for each fit."""
    return lambda: StaleSyncStrategy(paradigm=paradigm, data=data)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "local SGD": LocalSGD,
    "hpsgd": lambda: "hpsgd",
    "bsp": server("bsp", "shards"),
    "ssp": server("ssp", "shards"),
    "dssp": server("dssp", "shards"),
    "asp": server("asp", "shards"),
    "asp, on demand": server("asp", "on-demand"),
    "bounded-delay, on demand": server("bounded-delay", "on-demand"),
    ALONE: lambda: "auto",
}


@dataclass
class Measured:
    """A strategy in a case, once: when the batches of each worker ended, and what the strategy counted."""

    case: str
    name: str
    ends: list[list[float]]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def window(self) -> tuple[float, float]:
        """From the end of the warm-up to the end of everything."""
        ends = sorted(itertools.chain.from_iterable(self.ends))
        return ends[WARM_UP * len(self.ends) - 1], ends[-1]

    @property
    def counts(self) -> list[int]:
        """Batches of each worker between them."""
        start, _ = self.window
        return [sum(end > start for end in mine) for mine in self.ends]

    @property
    def rate(self) -> float:
        """Samples per second; of those that are alone, each until its own end."""
        if self.name == ALONE:
            return sum(BATCH * (len(mine) - WARM_UP) / (mine[-1] - mine[WARM_UP - 1]) for mine in self.ends)
        start, end = self.window
        return BATCH * sum(self.counts) / (end - start)

    def waiting(self, alone: list[float]) -> float:
        """Return the share of time that is not the workers' steps, which take ``alone`` seconds each by themselves."""
        start, end = self.window
        own = sum(count * seconds for count, seconds in zip(self.counts, alone, strict=True))
        return 1 - own / (len(self.ends) * (end - start))


def work(case: str, worker: int, devices: int) -> tuple[float, list[Any]]:
    """Return what ``worker`` has to do in a step, with ``devices`` in its run: the layer's time, and callbacks."""
    if case not in TRACED:
        return STEP_S[case] * (SLOW_FACTOR if case == "unequal" and worker == 0 else 1.0), []
    workers = range(WORKERS) if devices > 1 else [worker]
    trace = real_job(case.upper(), scale=SCALES[case], workers=workers) if case in SCALES else hiccups(workers)
    base_s = STEP_S[case] / 2
    return base_s, [StragglerInjection(trace=trace, step_s=base_s)]


def hiccups(workers: Sequence[int]) -> StepTrace:
    """Return steps of 20 ms, of which 3 in each 20 take 100 ms: which ones is drawn for each worker."""
    rows = ["job,worker,stage,step,compute_s"]
    for worker in range(WORKERS):
        draw = random.Random(worker)
        for begin in range(0, 1000, 20):
            slow = draw.sample(range(20), 3)
            rows += [f"hiccups,{worker},0,{begin + n},{STEP_S['hiccups'] * (5 if n in slow else 1)}" for n in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.csv"
        path.write_text("\n".join(rows))
        return StepTrace(path, workers=workers)


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _run_alone(arguments: argparse.Namespace) -> list[Measured]:
    """One process: each worker's steps in turn, with nobody beside it."""
    results = []
    for case in arguments.cases:
        for worker in range(WORKERS) if case in TRACED else (0, 1):  # the others are as number 1
            step_s, callbacks = work(case, worker, 1)
            ends, _ = epoch("auto", arguments.steps, step_s, 1, callbacks)
            results.append(Measured(case, str(worker), [ends]))
    return results


def _run_together(arguments: argparse.Namespace) -> list[Measured]:
    """In every worker process: all strategies in all cases."""
    results = []
    rounds: Any = list(itertools.product(arguments.cases, arguments.strategies))
    if _rank() == 0:
        rounds = track(rounds, description=f"repetition {arguments.repetition}")
    for case, name in rounds:
        workers = 1 if name == ALONE else WORKERS
        step_s, callbacks = work(case, _rank(), workers)
        ends, summary = epoch(STRATEGIES[name](), arguments.steps, step_s, workers, callbacks)
        everyone: list[Any] = [None] * WORKERS
        torch.distributed.all_gather_object(everyone, ends)
        results.append(Measured(case, name, everyone, summary))
    return results


def _launch(what: str, repetition: int, arguments: argparse.Namespace) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, __file__, "--run", what, "--json", str(path), "--steps", str(arguments.steps)]
        command += ["--repetition", str(repetition), "--cases", *arguments.cases]
        command += ["--strategies", *arguments.strategies]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return [Measured(**one) for one in json.loads(path.read_text())]


def rows(case: str, names: list[str], alone: list[list[float]], measured: list[list[Measured]]) -> list[Row]:
    """Return the table of a case.

    Args:
        case: its name.
        names: of the strategies.
        alone: for each repetition, the seconds that a step of each worker takes by itself.
        measured: for each repetition, what was measured.
    """
    table = [Row(LIMIT, [BATCH * sum(1 / seconds for seconds in own) for own in alone])]
    for name in names:
        found = [next(one for one in each if (one.case, one.name) == (case, name)) for each in measured]
        waiting = [one.waiting(own) for one, own in zip(found, alone, strict=True)]
        row = Row(name, [one.rate for one in found], LIMIT)
        if name != ALONE:
            row.also["waiting"] = f"{statistics.median(waiting):.0%}"
        workers = [worker for one in found for worker in one.summary.get("workers", ())]
        if workers and "mean_staleness" in workers[0]:
            mean = statistics.mean(worker["mean_staleness"] for worker in workers)
            row.also["staleness (max)"] = f"{mean:.1f} ({max(worker['max_staleness'] for worker in workers)})"
        table.append(row)
    ddp = next((row for row in table if row.name == "ddp"), None)
    for row in table if ddp else ():
        row.also["of ddp"] = f"{row.median / ddp.median:.2f}"
    for row in table:
        if row.name == "bounded-delay, on demand" and case in ("unequal", "ar"):
            row.expected = ">= 0.95"
        elif row.name in ("ssp", "dssp", "asp") and case == "equal":
            row.expected = ">= 1.4 of ddp"
    return table


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each worker, on average, after a warm-up of 10")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    for hidden in ("--run", "--json", "--repetition"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        quiet()
        results = _run_alone(arguments) if arguments.run == "alone" else _run_together(arguments)
        if _rank() == 0:
            Path(arguments.json).write_text(json.dumps([vars(one) for one in results]))
        return
    if arguments.strategies[0] == ALONE:
        parser.error(f"--strategies {ALONE!r}: the first must start the workers, e.g. ddp")

    alone: dict[str, list[list[float]]] = {case: [] for case in arguments.cases}
    together: list[list[Measured]] = []
    for repetition in range(1, arguments.repetitions + 1):
        single = {(one.case, one.name): BATCH / one.rate for one in _launch("alone", repetition, arguments)}
        for case, repetitions in alone.items():
            repetitions.append([single[case, str(rank if case in TRACED else min(rank, 1))] for rank in range(WORKERS)])
        together.append(_launch("together", repetition, arguments))
    for case in arguments.cases:
        title = f"{WORKERS} {CASES[case]}"
        report(f"workers_{case}", title, "samples/s", rows(case, arguments.strategies, alone[case], together))


if __name__ == "__main__":
    main()
