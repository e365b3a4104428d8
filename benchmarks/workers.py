"""Steps per second of four workers, beside DDP in the same run and in the same processes.

A step takes 20 ms of an emulated accelerator: a layer that sleeps 7 ms in the forward and 13 ms in the backward pass.
So four workers run in parallel on two cores, while 1.1 M parameters, messages, copies, the optimizer and Lightning
stay real. First all workers are equal, then rank 0 is 2.3 times slower. Local SGD is Lightning's own (PostLocalSGD,
which averages the models every 4 steps).

    python benchmarks/workers.py [--repetitions 5] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from emulated import LocalSGD, milliseconds_per_step, quiet
from report import Row, report
from rich.progress import track

from lightning_stale import StaleSyncStrategy  # its import registers the strategies

STEP_S, WORKERS, SLOW_FACTOR = 0.020, 4, 2.3
STRATEGIES = ("ddp", "local SGD", "bsp", "ssp", "dssp", "asp")


def measure(name: str, steps: int, slow: bool, workers: int) -> list[float]:
    """Return the milliseconds per step of each worker."""
    step_s = STEP_S * (SLOW_FACTOR if slow and _rank() == 0 else 1.0)
    own = {"local SGD": LocalSGD, "asp": lambda: StaleSyncStrategy(paradigm="asp", data="shards")}
    mine = milliseconds_per_step(own[name]() if name in own else name, steps, step_s, workers)
    everyone: list[Any] = [mine]
    if workers > 1:
        everyone = [None] * workers
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _run(arguments: argparse.Namespace) -> None:
    """In every worker process: all strategies, in turn, ``repetitions`` times."""
    quiet()
    names = ["auto"] if arguments.workers == 1 else STRATEGIES
    cases = [(slow, name) for slow in ((False,) if arguments.workers == 1 else (False, True)) for name in names]
    rounds = [case for _ in range(arguments.repetitions) for case in cases]
    if _rank() == 0:
        rounds = track(rounds, description=f"{arguments.workers} worker(s)")
    results = [(slow, name, measure(name, arguments.steps, slow, arguments.workers)) for slow, name in rounds]
    if _rank() == 0:
        Path(arguments.json).write_text(json.dumps(results))


def _launch(workers: int, arguments: argparse.Namespace) -> list[tuple[bool, str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, __file__, "--workers", str(workers), "--json", str(path)]
        command += ["--repetitions", str(arguments.repetitions), "--steps", str(arguments.steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(path.read_text())


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers:
        _run(arguments)
        return
    alone = [times[0] for _, _, times in _launch(1, arguments)]
    together = _launch(WORKERS, arguments)

    def rate(slow: bool, name: str, ranks: slice) -> list[float]:
        """Steps per second, a value per repetition: the sum of the workers' rates."""
        return [sum(1e3 / t for t in times[ranks]) for s, n, times in together if (s, n) == (slow, name)]

    equal = [Row("one worker alone, times 4 (limit)", [WORKERS * 1e3 / t for t in alone], "ddp")]
    equal += [Row(n, rate(False, n, slice(None)), None if n == "ddp" else "ddp") for n in STRATEGIES]
    for row in equal:
        row.expected = ">= 1.4" if row.name in ("ssp", "dssp", "asp") else ""
    report("workers_equal", f"{WORKERS} equal workers, 20 ms a step: all their steps", "steps/s", equal)

    limit = [(WORKERS - 1 + 1 / SLOW_FACTOR) * 1e3 / t for t in alone]
    unequal = [Row("sum of the workers' own rates (limit)", limit, "ddp")]
    unequal += [Row(n, rate(True, n, slice(None)), None if n == "ddp" else "ddp") for n in STRATEGIES]
    own = "a fast worker alone"
    unequal += [Row(own, [1e3 / t for t in alone])]
    unequal += [
        Row("asp: a fast worker", [r / (WORKERS - 1) for r in rate(True, "asp", slice(1, None))], own, ">= 0.9")
    ]
    report("workers_unequal", f"{WORKERS} workers, one {SLOW_FACTOR} times slower: all their steps", "steps/s", unequal)


if __name__ == "__main__":
    main()
