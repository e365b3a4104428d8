"""A metric over time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning as L


class Curve(L.Callback):
    """Keeps ``[seconds since training started, metric]`` after each validation in a JSON file.

    Args:
        path: of the file; rank 0 writes it anew each time, so that a run that fails has one too.
        metric: the name under which the module logs it.
    """

    def __init__(self, *, path: str, metric: str) -> None:
        self.path, self.metric = Path(path), metric
        self.points: list[tuple[float, float]] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self._started or time.perf_counter()  # after the strategy has started its server

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self._started:
            return
        if self.metric not in trainer.callback_metrics:
            raise ValueError(f"callbacks.curve.metric={self.metric}: write one of {sorted(trainer.callback_metrics)}")
        self.points.append((time.perf_counter() - self._started, float(trainer.callback_metrics[self.metric])))
        self.path.write_text(json.dumps(self.points))
