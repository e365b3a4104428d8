"""``trainer.predict()`` over a pipeline: only the rank of the last stage, rank 0, has predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_stale.private import of_lightning


def share_predictions(trainer: Trainer) -> list[Callable[[], Any]]:
    """Let ``trainer.predict()`` return rank 0's predictions everywhere, and rank 0 alone write them.

    They are sent batch by batch, so that no rank holds them twice; with ``return_predictions=False`` nothing is sent.

    Returns:
        What undoes it.
    """
    loop, broadcast = trainer.predict_loop, trainer.strategy.broadcast
    run = loop.run

    def run_and_share() -> Any:
        predictions = run()
        if predictions is None:
            return None
        return [broadcast(predictions[n] if trainer.is_global_zero else None) for n in range(len(predictions))]

    loop.run = run_and_share  # type: ignore[method-assign]
    undo: list[Callable[[], Any]] = [partial(loop.__dict__.pop, "run", None)]
    for callback in of_lightning.callbacks(trainer) if not trainer.is_global_zero else ():
        if isinstance(callback, BasePredictionWriter):
            for name in ("write_on_batch_end", "write_on_epoch_end"):
                setattr(callback, name, _write_nothing)
                undo.append(partial(callback.__dict__.pop, name, None))
    return undo


def _write_nothing(*_: Any) -> None:
    """On a rank that has nothing."""
