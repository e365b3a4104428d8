"""Write down how long each worker takes for its steps: what ``python -m lightning_stale simulate`` predicts from."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stale.paradigms import ASP
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


class StepLog(Callback):
    """Write how long this worker computed in each step, and how long it waited after it, to ``steps-RANK.csv``.

    Under ``"asp"``, where nobody waits for anybody, the mean wait is what an exchange costs. At the end of ``fit`` rank
    0 says which command predicts from the files what each paradigm would make of these workers.

    Args:
        folder: of the files, which are written anew by each ``fit``; ``None``: the trainer's ``default_root_dir``.

    Raises:
        MisconfigurationException: at the start of ``fit`` with a strategy whose workers do not measure it.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import StepLog
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="asp", callbacks=[StepLog()], logger=False,
        ...                   enable_checkpointing=False)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._rows: list[tuple[int, int, float, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to write."""
        if stage == "fit" and not isinstance(trainer.strategy, StaleSyncStrategy):
            raise MisconfigurationException(
                f"StepLog writes what the workers of a parameter server measure, and {type(trainer.strategy).__name__} "
                "has none: write Trainer(strategy='asp') for a run of two minutes, or leave the callback out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._rows.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the times of the last push."""
        assert isinstance(trainer.strategy, StaleSyncStrategy)
        last = trainer.strategy.last_release
        if last is not None:
            self._rows.append((trainer.global_rank, len(self._rows), last.compute_s, last.wait_s))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        folder = Path(trainer.default_root_dir if self.folder is None else self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"steps-{trainer.global_rank}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("worker", "step", "compute_s", "wait_s"))
            writer.writerows(
                (*numbers, f"{computed:.6f}", f"{waited:.6f}") for *numbers, computed, waited in self._rows
            )
        assert isinstance(trainer.strategy, StaleSyncStrategy)
        exchange = ""
        if self._rows and isinstance(trainer.strategy.paradigm, ASP):
            mean_s = sum(waited for *_, waited in self._rows) / len(self._rows)
            exchange = f" --exchange-ms {1e3 * mean_s:.3g}"
        rank_zero_info(f"StepLog: python -m lightning_stale simulate --log {folder}/steps-*.csv{exchange}")
