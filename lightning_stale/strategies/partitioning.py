"""Partition the model of a Trainer as the user has asked for."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_stale.pipeline.alike.random_state import kept
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.partition.costs import count_parameters, measure_layers
from lightning_stale.pipeline.partition.model import Split, partition_model
from lightning_stale.private import of_lightning


def partition(trainer: Trainer, stages: int, name: str | None, split: Split) -> tuple[nn.Module, list[Block]]:
    """Return the module that the blocks replace, and the blocks; see :func:`partition_model`.

    Args:
        trainer: with the LightningModule, and the data for ``split="time"``.
        stages: the number of blocks.
        name: of the module to partition.
        split: how.

    Raises:
        PartitionError: names the module, and the alternatives.
    """

    def measure(body: nn.Sequential) -> list[float]:
        if trainer.state.fn != TrainerFn.FITTING:  # no training data to time
            return [count_parameters(layer) for layer in body]
        seconds: list[float] = []
        if trainer.is_global_zero:  # measured once, on what the body is given for the first batch
            device = trainer.strategy.root_device
            with kept([device.index] if device.type == "cuda" else []):
                example = of_lightning.first_input(trainer, body)
            seconds = measure_layers(body, example, context=trainer.precision_plugin.forward_context)
        return list(trainer.strategy.broadcast(seconds))

    return partition_model(trainer.lightning_module, stages, name, split, measure)
