"""Accuracy at equal samples, 3 seeds: four workers learn handwritten digits with each strategy.

Sweeps of ``recipes/train.py`` (experiment=digits): with nobody slowed down, and, where batches are handed out on
demand, with one worker that is slow for good, which makes gradients stale. What a strategy gains in time counts for
little if it is lost here. Every run trains the same number of samples; how long DDP takes for them does not matter to
its accuracy, so it is measured once.

    python benchmarks/accuracy.py [--strategies ddp bsp ...] [--slow asp bounded-delay] [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf
from report import Row, report

ROOT = Path(__file__).parents[1]
STRATEGIES = ["ddp", "bsp", "ssp", "dssp", "hpsgd", "bounded-delay"]
SLOW = ["asp", "bounded-delay"]


def sweep(strategies: list[str], seeds: list[str], *overrides: str) -> dict[str, list[float]]:
    """Return the test accuracies of each strategy in per cent, a value per seed."""
    found: dict[str, list[float]] = {name: [] for name in strategies}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), "-m", "experiment=digits", *overrides]
        command += [f"trainer/strategy={','.join(strategies)}", f"seed={','.join(seeds)}"]
        subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True)
        for results in sorted(Path(folder).glob("*/results.json")):
            name = OmegaConf.load(results.parent / ".hydra" / "hydra.yaml").hydra.runtime.choices["trainer/strategy"]
            found[name].append(100 * json.loads(results.read_text())["metrics"]["test_accuracy"])
    return found


def main() -> None:
    """Sweep, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="with equal workers; compared to the first")
    parser.add_argument("--slow", nargs="*", default=SLOW, help="on demand, with one worker that is slow for good")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    arguments = parser.parse_args()
    found = sweep(arguments.strategies, arguments.seeds, "~callbacks.stragglers")
    if arguments.slow:
        slow = sweep(arguments.slow, arguments.seeds, "trainer.strategy.data=on-demand")
        found |= {f"{name}, on demand, one slow": values for name, values in slow.items()}
    baseline = statistics.mean(found[arguments.strategies[0]])
    rows = [Row(f"{name}: mean {statistics.mean(values):.2f}", values) for name, values in found.items()]
    for row, values in zip(rows, found.values(), strict=True):
        row.expected = f">= {baseline - 1:.2f} in the mean: {statistics.mean(values) >= baseline - 1}"
    report("accuracy", f"Digits, 4 workers, seeds {', '.join(arguments.seeds)}: test accuracy", "%", rows)


if __name__ == "__main__":
    main()
