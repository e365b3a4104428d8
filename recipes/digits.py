"""Handwritten digits on four unequal workers: Lightning's DDP beside BSP, SSP and DSSP.

Every worker is slowed down at random (by StragglerInjection), as by a busy neighbour or a slow disk. DDP and BSP wait
for the slowest worker at every batch; SSP and DSSP let the others go on, within bounds. The data set is scikit-learn's,
and needs no download.

    python recipes/digits.py [--epochs 12] [--strategies ddp bsp ssp dssp asp hpsgd] [--seed 1] [--out outputs]
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_stale import HPSGDStrategy, StaleSyncStrategy, StragglerInjection

WORKERS = 4
BATCH = 16  # per worker
STEP_S = 0.02  # what a step would take on an accelerator, for the random slow-down


class Digits(L.LightningModule):
    """A small convolutional network for 8x8 digits; nothing in it knows of staleness."""

    def __init__(self, lr: float = 0.002) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def make_loaders(seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of 1437 training and 360 test images, (batch, 1, 8, 8) in 0..1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=seed, stratify=labels)
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=BATCH, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=90),
    )


class Stopwatch(L.Callback):
    """Notes accuracy over time and moves the progress bar; times DDP's all-reduce, which DDP itself does not report."""

    def __init__(self, name: str, progress: Progress | None) -> None:
        self.name = name
        self.progress = progress
        self.task: Any = None
        self.curve: list[tuple[float, float]] = []  # (seconds, accuracy)
        self.wait_s = 0.0
        self._started = 0.0
        self._last_gradient = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
        if self.progress is not None:
            self.task = self.progress.add_task(self.name, total=trainer.estimated_stepping_batches, accuracy="")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self._started or time.perf_counter()  # after the strategy has started its server

    def _note_gradient(self, _: Tensor) -> None:
        self._last_gradient = time.perf_counter()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wait_s += time.perf_counter() - self._last_gradient

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["accuracy"])
        self.curve.append((time.perf_counter() - self._started, accuracy))
        if self.progress is not None:
            self.progress.update(self.task, accuracy=f"accuracy {accuracy:.1%}")


def train(name: str, epochs: int, seed: int, progress: Progress | None) -> dict[str, Any]:
    """Train with one strategy; return what is to be shown of it."""
    L.seed_everything(seed, verbose=False)
    train_loader, test_loader = make_loaders(seed)
    stopwatch = Stopwatch(name, progress)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORKERS,
        strategy=name,
        max_epochs=epochs,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        callbacks=[StragglerInjection(step_s=STEP_S, probability=0.15, slowdown=5.0, seed=seed), stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, train_loader, test_loader)
    test = trainer.test(model, test_loader, verbose=False)[0]["accuracy"]
    seconds = stopwatch.curve[-1][0]
    row = {
        "paradigm": name,
        "seconds": seconds,
        "samples_per_s": epochs * len(train_loader.dataset) / seconds,
        "accuracy": test,
        "curve": stopwatch.curve,
    }
    row |= {"mean_lead": 0.0, "max_lead": 0, "mean_staleness": 0.0}
    if isinstance(trainer.strategy, (StaleSyncStrategy, HPSGDStrategy)):
        workers = trainer.strategy.summary()["workers"]
        wait_s, compute_s = (sum(worker[key] for worker in workers) for key in ("wait_s", "compute_s"))
        row["waiting"] = wait_s / (wait_s + compute_s)
        if isinstance(trainer.strategy, StaleSyncStrategy):  # HPSGD's workers have no lead, but rounds
            row["mean_lead"] = sum(worker["mean_lead"] for worker in workers) / len(workers)
            row["max_lead"] = max(worker["max_lead"] for worker in workers)
            row["mean_staleness"] = sum(worker["mean_staleness"] for worker in workers) / len(workers)
        return row
    waits = trainer.strategy.all_gather(torch.tensor(stopwatch.wait_s))
    return row | {"waiting": float(waits.mean()) / seconds}


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Return the comparison as a table that fits 80 columns."""
    table = Table(title=f"Handwritten digits, {WORKERS} workers slowed down at random", box=box.SIMPLE_HEAD)
    for heading in ("paradigm", "time", "samples/s", "waiting", "lead (max)", "staleness", "accuracy"):
        table.add_column(heading, justify="left" if heading == "paradigm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["paradigm"],
            f"{row['seconds']:.1f} s",
            f"{row['samples_per_s']:,.0f}",
            f"{row['waiting']:.0%}",
            f"{row['mean_lead']:.1f} ({row['max_lead']})",
            f"{row['mean_staleness']:.1f}",
            f"{row['accuracy']:.1%}",
        )
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw test accuracy over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        seconds, accuracy = zip(*row["curve"], strict=True)
        axes.plot(seconds, [100 * a for a in accuracy], marker="o", markersize=4, label=row["paradigm"])
    axes.set(xlabel="time (s)", ylabel="test accuracy (%)", title=f"Digits, {WORKERS} workers slowed down at random")
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]), top=100.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train with each strategy in turn, in the same worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "bsp", "ssp", "dssp"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    console = Console()
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )
    rows = []
    with Progress(*columns, console=console) as progress:
        for name in arguments.strategies:
            rows.append(train(name, arguments.epochs, arguments.seed, progress if rank_zero_only.rank == 0 else None))
    if rank_zero_only.rank != 0:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "digits.json").write_text(json.dumps(rows, indent=2))
    draw(rows, arguments.out / "digits.png")
    console.print(make_table(rows))
    console.print(f"Accuracy over time: {arguments.out / 'digits.png'}")


if __name__ == "__main__":
    main()
