"""Real compute: a ResNet on CIFAR-10 cut into two stages, beside the same network in one process.

One core each. The images come from the Hugging Face data set uoft-cs/cifar10, from the hub or a folder with its parquet
files. DSP cuts the network where both halves take the same measured time.

    python benchmarks/pipeline_cifar.py [--data FOLDER] [--repetitions 5] [--batches 25]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import numpy as np
import torch
from datasets import load_dataset
from emulated import batches_per_second, quiet
from report import Row, report
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from recipes.models import cifar_resnet

BATCH, WARM_UP = 64, 6
CASES: dict[str, dict[str, Any]] = {
    "DSP, 2 stages": {},
    "DSP, 2 stages, no recompute": {"recompute": False},
    "back-propagation, 2 stages": {"staleness": "bp"},
}


class ResNet20(L.LightningModule):
    """ResNet-20 for 32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cifar_resnet(depth=20)
        self.marks: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.marks.append(time.perf_counter())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def images(folder: str | None, count: int) -> TensorDataset:
    """Return ``count`` images, (3, 32, 32) in -1..1, and their labels."""
    files = {"test": f"{folder}/test-*.parquet"}
    rows = load_dataset("parquet", data_files=files) if folder else load_dataset("uoft-cs/cifar10")
    chosen = rows["test"].select(range(count))
    pixels = torch.tensor(np.stack([np.asarray(image) for image in chosen["img"]]))
    return TensorDataset(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(chosen["label"]))


def _measure(arguments: argparse.Namespace) -> None:
    """In one process, or in each of two: all cases, in turn."""
    quiet()
    torch.set_num_threads(1)
    loader = DataLoader(images(arguments.data, BATCH * (arguments.batches + WARM_UP)), batch_size=BATCH)
    cases = {"one process": None} if arguments.devices == 1 else CASES
    rounds = [name for _ in range(arguments.repetitions) for name in cases]
    results = []
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for name in track(rounds, description=f"{arguments.devices} process(es)") if first else rounds:
        strategy = "auto" if arguments.devices == 1 else DSPStrategy(split="time", **CASES[name])
        results.append((name, batches_per_second(ResNet20(), loader, arguments.devices, strategy, WARM_UP)))
    if first:
        arguments.json.write_text(json.dumps(results))


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with test-*.parquet; by default from the Hugging Face hub")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--devices", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.devices:
        _measure(arguments)
        return
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(arguments.repetitions):  # alternating
            for devices in (1, 2):
                path = Path(folder) / f"{repetition}-{devices}.json"
                options = ["--devices", str(devices), "--json", str(path), "--repetitions", "1"]
                options += [
                    "--batches",
                    str(arguments.batches),
                    *(["--data", arguments.data] if arguments.data else []),
                ]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run([sys.executable, __file__, *options], check=True, env=environment)
                measured += json.loads(path.read_text())
    rows = [
        Row(name, [rate for n, rate in measured if n == name], None if name == "one process" else "one process")
        for name in ("one process", *CASES)
    ]
    report("pipeline_cifar", f"ResNet-20 on CIFAR-10, batches of {BATCH}, one core a process", "batches/s", rows)


if __name__ == "__main__":
    main()
