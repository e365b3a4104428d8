"""Where all workers meet: before validation, at the end of an epoch, and at the end of fit."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_stale.strategies.checks import check_validation_batches
from lightning_stale.strategies.trained_parameters import TrainedParameters


class Meets(Protocol):
    """As much of a strategy as is called."""

    def meet(self, place: str) -> None:
        """Wait until all ranks are at ``place``."""

    def after_batch(self) -> None:
        """A training batch is over."""

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one fails."""


class MeetingPoints(Callback):
    """Calls the strategy before every other callback and hook; a strategy's own hooks would run after them.

    After each batch too, where its strategy has none.

    Checkpoints are a meeting point too, in ``StaleStrategy.lightning_module_state_dict``.
    """

    def __init__(self, strategy: Meets) -> None:
        self._strategy = strategy
        self._trained: TrainedParameters | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = TrainedParameters(pl_module, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._strategy.after_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._strategy.meet("validation")
        check_validation_batches(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.meet("the end of an epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.meet("the end of fit")
        if self._trained is not None:
            self._trained.check()
            self._trained = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._strategy.report(exception)
