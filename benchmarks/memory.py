"""The most memory that each process holds: what no rank should need, and the one that writes must.

A model of 402 MB (24 layers) with Adam, 1.2 GB in all, on four ranks of DSP: at the end of set-up, while it trains, at
a checkpoint, and after ``fit``; beside one process that trains the same. A value is the peak within the phase of what
the process has allocated (Linux's RssAnon, looked at every millisecond), above what it had before the model was built.

    python benchmarks/memory.py [--width 2048] [--layers 24]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from emulated import quiet
from lightning.pytorch.callbacks import Callback
from report import Row, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy

RANKS, BATCHES = 4, 6
PHASES = ("set-up", "training", "checkpoint", "end of fit", "resume")


class Sampler(threading.Thread):
    """Looks at the memory of this process again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, self.now_mb())
            time.sleep(0.001)

    @staticmethod
    def now_mb() -> float:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found.group(1)) / 1024


class Model(L.LightningModule):
    """Linear layers, on the meta device: each rank has memory for its part only."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def init_weights(self) -> None:
        for layer in self.net:
            layer.reset_parameters()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Peaks(Callback):
    """Notes the peak of each phase."""

    def __init__(self, path: str) -> None:
        self.path, self.sampler = path, Sampler()
        self.peaks: dict[str, float] = {}
        self.base = self.sampler.now_mb()

    def note(self, phase: str) -> None:
        self.peaks[phase] = self.sampler.peak_mb - self.base
        self.sampler.peak_mb = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.note("resume" if trainer.global_step else "set-up")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None:
            self.note("training")
            trainer.save_checkpoint(self.path)
            self.note("checkpoint")


def run(ranks: int, width: int, layers: int, folder: str) -> dict[str, float]:
    """Train, save and resume; return the peak of each phase in MB."""
    quiet()
    same = torch.Generator().manual_seed(0)  # on all ranks
    data = DataLoader(TensorDataset(torch.randn(BATCHES * 4, width, generator=same)), batch_size=4)
    path = str(Path(folder) / "model.ckpt")
    peaks = Peaks(path)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    strategy = {"process_group_backend": "gloo", "staleness": "bp"}
    model = Model(width, layers)
    trainer = L.Trainer(**options, max_epochs=1, callbacks=[peaks], strategy=DSPStrategy(**strategy))
    trainer.fit(model, data)
    peaks.note("end of fit")
    del model, trainer
    gc.collect()
    trainer = L.Trainer(**options, max_epochs=2, callbacks=[peaks], strategy=DSPStrategy(**strategy))
    trainer.fit(Model(width, layers), data, ckpt_path=path)
    return peaks.peaks


def _rank(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = run(arguments.ranks, arguments.width, arguments.layers, arguments.folder)
    Path(arguments.folder, f"{arguments.ranks}-{arguments.rank}.json").write_text(json.dumps(found))


def _launch(ranks: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        sizes = ["--width", str(arguments.width), "--layers", str(arguments.layers), "--folder", folder]
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--rank", str(rank), "--ranks", str(ranks), *sizes]
            processes.append(subprocess.Popen(command, env=environment))
        for process in processes:
            if process.wait() != 0:
                raise RuntimeError(f"a rank ended with status {process.returncode}")
        return [json.loads(Path(folder, f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=RANKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank >= 0:
        _rank(arguments)
        return
    (alone,), together = _launch(1, arguments), _launch(RANKS, arguments)
    rows = []
    for phase in PHASES:
        rows.append(Row(f"{phase}: one process with everything", [alone[phase]]))
        rows.append(Row(f"{phase}: rank 0", [together[0][phase]], rows[-1].name))
        others = Row(f"{phase}: the other ranks", [peaks[phase] for peaks in together[1:]], rows[-2].name, "<= 0.4")
        rows.append(others)
    size = arguments.width * (arguments.width + 1) * arguments.layers * 4 / 2**20
    report("memory", f"{RANKS} ranks of DSP, weights of {size:.0f} MB, Adam: peak of each phase", "MB", rows)


if __name__ == "__main__":
    main()
