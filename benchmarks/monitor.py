"""What StalenessMonitor costs in a step, over a step of 5 ms: one process, steps without an accelerator's work.

In one fit it takes part in every other hundred steps. Counted is the processor's time of the thread that trains, so
that neighbours on the machine do not matter much; the difference between neighbouring hundreds is all that the monitor
costs there, with what Lightning does for what is logged. Once as by default, every 50 steps, and once logged in every
step.

    python benchmarks/monitor.py [--repetitions 7] [--steps 2000]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from report import Row, report
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy, HPSGDStrategy, StalenessMonitor, StaleSyncStrategy

STEP_US = 5000.0
CASES: dict[str, tuple[Callable[[], Any], int]] = {  # strategy, log_every_n_steps
    "dssp": (lambda: StaleSyncStrategy(paradigm="dssp"), 50),
    "hpsgd": (lambda: HPSGDStrategy(interval=4), 50),
    "dsp, 3 virtual stages": (lambda: DSPStrategy(stages=3), 50),
    "dssp, log_every_n_steps=1": (lambda: StaleSyncStrategy(paradigm="dssp"), 1),
}
WINDOW = 100
FIRST = 25  # so that no window begins right after a step that was logged


class Model(L.LightningModule):
    """Hardly computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)  # as everybody does: the logger writes without the monitor too
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def takes_part(batch_idx: int) -> bool:
    """Whether the monitor does in this step."""
    return (batch_idx - FIRST) // WINDOW % 2 == 1


class Half(StalenessMonitor):
    """Takes part in every other window."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if takes_part(batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if takes_part(batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class ThreadTime(L.Callback):
    """Takes the time at the beginning of each step, before all other callbacks."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.thread_time())

    def cost_us(self) -> float:
        """Return the median difference between a window and those around it, by step."""
        windows = [
            1e6 * (self.times[start + WINDOW] - self.times[start]) / WINDOW
            for start in range(FIRST, len(self.times) - WINDOW, WINDOW)
        ]
        with_it = range(3, len(windows) - 1, 2)  # the first one registers what is logged
        return statistics.median(windows[n] - (windows[n - 1] + windows[n + 1]) / 2 for n in with_it)


def cost_us(make: Callable[[], Any], every: int, steps: int, folder: str) -> float:
    """Return the microseconds of the monitor in a step."""
    clock = ThreadTime()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=make(),
        max_epochs=1,
        callbacks=[clock, Half(print_summary=False, save_summary=False, prog_bar=False)],
        logger=CSVLogger(folder),
        log_every_n_steps=every,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    data = TensorDataset(torch.randn(4 * steps, 8))
    trainer.fit(Model(), DataLoader(data, batch_size=4))
    return clock.cost_us()


def main() -> None:
    """Measure, print, and write ``results/monitor.json`` and ``results/monitor.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    torch.set_num_threads(1)
    costs: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(arguments.repetitions)):
            for name, (make, every) in CASES.items():
                costs[name].append(cost_us(make, every, arguments.steps, folder))
    rows = [Row("a step of 5 ms", [STEP_US])]
    for name, values in costs.items():
        expected = "below 0.01" if CASES[name][1] == 50 else ""
        share = f"{statistics.median(values) / STEP_US:.2%}"
        rows.append(Row(name, values, against=rows[0].name, expected=expected, also={"of 5 ms": share}))
    report("monitor", "what StalenessMonitor costs in a step", "us", rows)


if __name__ == "__main__":
    main()
