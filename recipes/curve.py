"""A metric over time, and over the samples that all workers have trained."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.data import extract_batch_size


class Curve(L.Callback):
    """Keeps ``[seconds since training started, samples of all workers, metric]`` after each validation in a JSON file.

    Samples are counted in batches of equal workers, as Lightning does, of the size of this rank's first.

    Args:
        path: of the file; rank 0 writes it anew each time, so that a run that fails has one too.
        metric: the name under which the module logs it.
    """

    def __init__(self, *, path: str, metric: str) -> None:
        self.path, self.metric = Path(path), metric
        self.points: list[tuple[float, int, float]] = []
        self._started = 0.0
        self._batch_size = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self._started or time.perf_counter()  # after the strategy has started its server

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_size = self._batch_size or extract_batch_size(batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self._started:
            return
        if self.metric not in trainer.callback_metrics:
            raise ValueError(f"callbacks.curve.metric={self.metric}: write one of {sorted(trainer.callback_metrics)}")
        topology = getattr(trainer.strategy, "topology", None)  # ours: the ranks of a pipeline are one replica
        replicas = trainer.world_size if topology is None else topology.replicas
        samples = (trainer.fit_loop.total_batch_idx + 1) * self._batch_size * replicas
        seconds = time.perf_counter() - self._started
        self.points.append((seconds, samples, float(trainer.callback_metrics[self.metric])))
        self.path.write_text(json.dumps(self.points))
