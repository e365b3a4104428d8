"""What only the rank of the last stage has measured is told to the others, whose callbacks and schedulers need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_stale.private import of_lightning


class MetricsRelay(Callback):
    """Copies ``trainer.callback_metrics`` of rank 0 to all ranks, before any other callback looks for them.

    Args:
        meet: drains the pipeline.
        end_evaluation: called at the end of each validation, test or prediction.
    """

    def __init__(self, meet: Callable[[str], None], end_evaluation: Callable[[], None]) -> None:
        self._meet, self._end_evaluation = meet, end_evaluation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drain for a checkpoint first: a stage that still waits for gradients would be missing in a collective."""
        if any(of_lightning.saves_now(callback, trainer) for callback in of_lightning.callbacks(trainer)):
            self._meet("a checkpoint")
            self._relay(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()
        self._relay(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._relay(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()
        self._relay(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()

    def _relay(self, trainer: Trainer) -> None:
        metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        metrics = trainer.strategy.broadcast(metrics)
        if not trainer.is_global_zero:
            trainer.callback_metrics.update(metrics)
