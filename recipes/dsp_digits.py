"""Handwritten digits through a pipeline of three stages: DSP(1,1,0; 4,2,0) beside back-propagation.

The convolutional network of digits.py is cut into three blocks, one per process; each block is updated at once, from
features and gradients that are up to four batches old (arXiv 1909.02625). Back-propagation runs through the same
pipeline, where the stages wait for each other. The learning rate is warmed up: staleness times learning rate is what
breaks convergence.

    python recipes/dsp_digits.py [--epochs 12] [--seed 1]
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from digits import Digits, make_loaders
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_stale import DSPStrategy

STAGES, WARM_UP_STEPS = 3, 100


class DigitsWithWarmUp(Digits):
    """The learning rate grows over the first steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=WARM_UP_STEPS)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


class Stopwatch(L.Callback):
    """Times training without set-up, and moves the progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task
        self.started = self.ended = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.started or time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = time.perf_counter()
        self.progress.update(self.task, completed=trainer.current_epoch + 1)


def train(staleness: Any, queues: Any, epochs: int, seed: int, stopwatch: Stopwatch) -> dict[str, Any]:
    """Train, test, and return what is to be shown."""
    L.seed_everything(seed, verbose=False)
    train_loader, test_loader = make_loaders(seed)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=STAGES,
        strategy=DSPStrategy(staleness=staleness, queues=queues, split="time"),
        max_epochs=epochs,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitsWithWarmUp()
    trainer.fit(model, train_loader)
    stages = trainer.strategy.summary()["stages"]
    test = trainer.test(model, test_loader, verbose=False)
    seconds = stopwatch.ended - stopwatch.started
    accuracy = test[0].get("accuracy", float("nan")) if test else float("nan")  # measured on rank 0 only
    return {"seconds": seconds, "accuracy": accuracy, "stages": stages}


def main() -> None:
    """Train both ways, and show them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    ways = {"back-propagation": ("bp", None), "DSP(1,1,0; 4,2,0)": ((4, 2, 0), (1, 1, 0))}
    table = Table(title=f"Handwritten digits, {STAGES} stages: time, accuracy, how busy each is", box=box.SIMPLE_HEAD)
    for heading in ("", "time", "accuracy", *(f"stage {k}" for k in range(STAGES))):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    columns = (TextColumn("{task.description:>17}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with Progress(*columns, TimeElapsedColumn(), disable=rank_zero_only.rank != 0) as progress:
        for name, (staleness, queues) in ways.items():
            stopwatch = Stopwatch(progress, progress.add_task(name, total=arguments.epochs))
            result = train(staleness, queues, arguments.epochs, arguments.seed, stopwatch)
            busy = [f"{stage['busy_s'] / result['seconds']:.0%}" for stage in result["stages"]]
            table.add_row(name, f"{result['seconds']:.1f} s", f"{result['accuracy']:.1%}", *busy)
    if rank_zero_only.rank == 0:
        Console().print(table)


if __name__ == "__main__":
    main()
