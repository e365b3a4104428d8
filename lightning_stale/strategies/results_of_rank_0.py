"""Rank 0 has the last stage, and with it metrics and predictions: how the other ranks of its replica get them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_warn
from torchmetrics import Metric

from lightning_stale.private import of_lightning

_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")
Undo = list[Callable[[], object]]


class MetricsOfRank0(Callback):
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
            self._copy(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()
        self._copy(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()
        self._copy(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()

    def _copy(self, trainer: Trainer) -> None:
        metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        metrics = trainer.strategy.broadcast(metrics)
        if not trainer.is_global_zero:
            trainer.callback_metrics.update(metrics)


def share_results(trainer: Trainer) -> Undo:
    """Let ``trainer.validate()``, ``test()`` and ``predict()`` return the results of rank 0 everywhere.

    Returns:
        What undoes it.
    """
    if trainer.predicting:
        return _share_predictions(trainer)
    if trainer.evaluating:
        loop = trainer.test_loop if trainer.testing else trainer.validate_loop
        run, broadcast = loop.run, trainer.strategy.broadcast
        return [of_lightning.replace(loop, "run", lambda: broadcast(run()))]
    return []


def separate_metrics(module: LightningModule) -> Undo:
    """Let torchmetrics gather over the replicas, of which there is one, and not over the stages.

    Returns:
        What undoes it.
    """
    undo: Undo = []
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None:
            undo.append(partial(setattr, metric, "distributed_available_fn", metric.distributed_available_fn))
            metric.distributed_available_fn = bool  # says False, and unlike a process group can be pickled
    return undo


def warn_of_gradients(trainer: Trainer, stages: int) -> None:
    """Warn if the user logs gradients, of which rank 0 has its own stage's."""
    if of_lightning.logs_in(trainer, _GRADIENT_HOOKS):
        rank_zero_warn(
            f"what {' and '.join(_GRADIENT_HOOKS)} log of gradients, such as their norm, is that of the last stage "
            f"alone: the gradients of the others are on other ranks. DSPStrategy(stages={stages}) with "
            "Trainer(devices=1) has them all"
        )


def _share_predictions(trainer: Trainer) -> Undo:
    """Rank 0 alone writes them; they are sent batch by batch, so that no rank holds them twice, and if asked for."""
    loop, broadcast = trainer.predict_loop, trainer.strategy.broadcast
    run = loop.run

    def run_and_share() -> Any:
        predictions = run()
        if predictions is None:
            return None
        return [broadcast(predictions[n] if trainer.is_global_zero else None) for n in range(len(predictions))]

    undo: Undo = [of_lightning.replace(loop, "run", run_and_share)]
    for callback in of_lightning.callbacks(trainer) if not trainer.is_global_zero else ():
        if isinstance(callback, BasePredictionWriter):
            undo += [
                of_lightning.replace(callback, name, _write_nothing)
                for name in ("write_on_batch_end", "write_on_epoch_end")
            ]
    return undo


def _write_nothing(*_: Any) -> None:
    """On a rank that has nothing."""
