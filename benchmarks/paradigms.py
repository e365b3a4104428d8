"""What a push costs the server's decisions, from 10 to 10,000 workers, for every paradigm: one core, no torch.

Workers take 1 s a step with a jitter of 10 %, and a tenth of them are twice as slow. So workers wait, are released in
crowds, DSSP's controller is asked, and the delay adapts. Counted is the processor's time, of the paradigm, with data
on demand of the leases of the epoch too, and of the benchmark's own loop, which stands in the first line alone.

    python benchmarks/paradigms.py [--pushes 1000000] [--workers 10 100 1000 10000]
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_stale.coordinator.leases import EpochLeases, Grants, Plan
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, tuple[Callable[[], Paradigm], bool]] = {  # whether data is handed out
    "bsp": (BSP, False),
    "asp": (ASP, False),
    "ssp(3)": (lambda: SSP(3), False),
    "dssp(3, 15)": (lambda: DSSP(3, 15), False),
    "dssp(3, 15), as printed": (lambda: DSSP(3, 15, enforce_upper=False), False),
    "asp, on demand": (ASP, True),
    "ssp(3), on demand": (lambda: SSP(3), True),
    "bounded-delay, on demand": (BoundedDelay, True),
    "bounded-delay('auto'), on demand": (lambda: BoundedDelay("auto"), True),
}
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999", "#882255"]
MARKERS = "os^Dv<>PX"


class _Nothing(ASP):
    """Decides nothing: what is left is the benchmark's own loop."""

    def push(self, worker: int, now: float) -> list[int]:
        return [worker]


def seconds(paradigm: Paradigm, workers: int, pushes: int, on_demand: bool) -> float:
    """Return how long ``pushes`` take."""
    generator = random.Random(0)
    jitter = [generator.uniform(0.9, 1.1) for _ in range(4099)]
    speed = [2.0 if worker % 10 == 0 else 1.0 for worker in range(workers)]
    queue: list[tuple[float, int]] = []
    done = 0

    def begin(worker: int, now: float) -> None:
        heapq.heappush(queue, (now + speed[worker] * jitter[(worker + done) % 4099], worker))

    for worker in range(workers):
        paradigm.join(worker, 0.0)
    if not on_demand:
        for worker in range(workers):
            begin(worker, 0.0)
        started = time.process_time()
        while done < pushes:
            now, worker = heapq.heappop(queue)
            done += 1
            for released in paradigm.push(worker, now):
                begin(released, now)
        return time.process_time() - started

    leases = EpochLeases(workers, paradigm.allows)
    steps = -(-pushes // workers) + 10
    leases.open(Plan(0, steps * workers, 1, steps, steps), range(workers))
    holds: dict[int, int] = {}

    def grant(grants: Grants, now: float) -> None:
        for worker, granted in grants:
            holds[worker] = granted.lease
            paradigm.note_grant(worker, now)
            begin(worker, now)

    for worker in range(workers):
        grant(leases.request(worker), 0.0)
    started = time.process_time()
    while done < pushes:  # in the order of the coordinator
        now, worker = heapq.heappop(queue)
        done += 1
        released = paradigm.push(worker, now)
        paradigm.note_commit(worker, now)
        grant(leases.commit(worker, [holds.pop(worker)]), now)
        for each in released:
            grant(leases.request(each), now)
    return time.process_time() - started


def main() -> None:
    """Measure, print, and write ``results/paradigms.json`` and ``results/paradigms.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=1_000_000, help="with the largest number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    arguments = parser.parse_args()
    results: dict[str, dict[int, float]] = {}
    largest = max(arguments.workers)
    for name, (make, on_demand) in track({"the loop alone": (_Nothing, False), **CASES}.items()):
        for workers in arguments.workers:
            pushes = arguments.pushes if workers == largest else max(arguments.pushes // 10, 20 * workers)
            results.setdefault(name, {})[workers] = seconds(make(), workers, pushes, on_demand) / pushes
    table = Table(title=f"microseconds per push, by workers ({arguments.pushes:,} pushes of {largest:,})")
    table.add_column("")
    for workers in arguments.workers:
        table.add_column(f"{workers:,}", justify="right")
    table.add_column("in all", justify="right")
    for name, times in results.items():
        row = [f"{1e6 * times[workers]:.1f}" for workers in arguments.workers]
        table.add_row(name, *row, f"{times[largest] * arguments.pushes:.1f} s")
    Console(width=100).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": "seconds per push, by workers",
        "pushes": arguments.pushes,
        "machine": f"{platform.machine()}, python {sys.version.split()[0]}, one core",
        "rows": results,
    }
    (RESULTS / "paradigms.json").write_text(json.dumps(content, indent=2) + "\n")
    _draw(RESULTS / "paradigms.png", results, arguments.workers)


def _draw(path: Path, results: dict[str, dict[int, float]], workers: list[int]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, times), colour, marker in zip(results.items(), ["#BBBBBB", *COLOURS], f"_{MARKERS}", strict=False):
        axes.plot(workers, [1e6 * times[n] for n in workers], color=colour, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="microseconds per push (processor time)")
    axes.set_title("What a push costs in decisions")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
