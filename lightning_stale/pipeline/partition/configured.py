"""Blocks that the LightningModule's ``configure_stages()`` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.partition.errors import PartitionError


def partition_configured(configure_stages: Callable[[], Sequence[nn.Module]], stages: int) -> list[Block]:
    """Return what ``configure_stages()`` makes.

    Raises:
        PartitionError: if those are not as many as ``stages``.
    """
    made = configure_stages()
    if len(made) != stages:
        raise PartitionError(
            f"configure_stages() returned {len(made)} blocks for {stages} stages: write stages={len(made)}, or "
            f"return {stages}"
        )
    return [Block(module) for module in made]
