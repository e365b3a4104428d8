"""Accuracy at equal samples, 3 seeds: four equal workers learn handwritten digits with each strategy.

A sweep of ``recipes/train.py`` (experiment=digits, nobody slowed down). What a strategy gains in time counts for little
if it is lost here.

    python benchmarks/accuracy.py [--strategies ddp bsp ssp dssp hpsgd] [--seeds 1 2 3]
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


def main() -> None:
    """Sweep, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "bsp", "ssp", "dssp", "hpsgd"])
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "recipes" / "train.py"),
            "-m",
            "experiment=digits",
            "~callbacks.stragglers",
        ]
        sweep = [f"trainer/strategy={','.join(arguments.strategies)}", f"seed={','.join(arguments.seeds)}"]
        subprocess.run([*command, *sweep, f"hydra.sweep.dir={folder}"], check=True)
        found: dict[str, list[float]] = {name: [] for name in arguments.strategies}
        for results in sorted(Path(folder).glob("*/results.json")):
            name = OmegaConf.load(results.parent / ".hydra" / "hydra.yaml").hydra.runtime.choices["trainer/strategy"]
            found[name].append(100 * json.loads(results.read_text())["metrics"]["test_accuracy"])
    baseline = statistics.mean(found[arguments.strategies[0]])
    rows = [Row(f"{name}: mean {statistics.mean(values):.2f}", values) for name, values in found.items()]
    for row, values in zip(rows, found.values(), strict=True):
        row.expected = f">= {baseline - 1:.2f} in the mean: {statistics.mean(values) >= baseline - 1}"
    report("accuracy", f"Digits, 4 workers, seeds {', '.join(arguments.seeds)}: test accuracy", "%", rows)


if __name__ == "__main__":
    main()
