"""What only the rank of the last stage has measured is told to the others, whose callbacks and schedulers need it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class MetricsRelay(Callback):
    """Copies ``trainer.callback_metrics`` of rank 0 to all ranks, before any other callback looks for them."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._relay(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._relay(trainer)

    def _relay(self, trainer: Trainer) -> None:
        metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        metrics = trainer.strategy.broadcast(metrics)
        if not trainer.is_global_zero:
            trainer.callback_metrics.update(metrics)
