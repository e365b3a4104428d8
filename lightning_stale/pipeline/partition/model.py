"""Which of the ways of partitioning a user has asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.partition.body import resolve
from lightning_stale.pipeline.partition.compiled import compile_blocks
from lightning_stale.pipeline.partition.configured import partition_configured
from lightning_stale.pipeline.partition.costs import count_parameters
from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.pipeline.partition.sequential import balanced_starts, check_starts, partition_sequential
from lightning_stale.pipeline.partition.traced import partition_traced
from lightning_stale.private.of_modules import unwrap

Split = Literal["params", "time"] | Sequence[int] | Sequence[str]
"""How: balanced by parameters or by time, where each further block starts, or the submodules that start one."""


def partition_model(
    model: nn.Module,
    stages: int,
    name: str | None,
    split: Split,
    measure: Callable[[nn.Sequential], Sequence[float]],
) -> tuple[nn.Module, list[Block]]:
    """Return the module that the blocks replace, and the blocks, over its very parameters.

    Args:
        model: the LightningModule.
        stages: the number of blocks.
        name: of the module to partition; by default one is chosen.
        split: how; ``configure_stages()``, if ``model`` has it, goes first.
        measure: returns, for ``split="time"``, the seconds of each layer; the same on all ranks.

    Raises:
        PartitionError: names the module, and the alternatives.

    Example::

        >>> from torch import nn
        >>> from lightning_stale.pipeline.partition.model import partition_model
        >>> model = nn.Module()
        >>> model.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16))
        >>> owner, blocks = partition_model(model, 2, None, "params", measure=len)
        >>> owner is model.net, [list(block.module) for block in blocks] == [list(model.net[:2]), list(model.net[2:])]
        (True, True)
    """
    configured = getattr(model, "configure_stages", None)
    if callable(configured):
        owner, path, blocks = model, "", partition_configured(configured, stages)
    else:
        owner, path, blocks = _partition_body(model, stages, name, split, measure)
    compile_blocks(model, path, blocks)
    return owner, blocks


def _partition_body(
    model: nn.Module,
    stages: int,
    name: str | None,
    split: Split,
    measure: Callable[[nn.Sequential], Sequence[float]],
) -> tuple[nn.Module, str, list[Block]]:
    names = [start for start in split if isinstance(start, str)] if not isinstance(split, str) else []
    path, names = resolve(model, name, names)
    body = unwrap(model.get_submodule(path))
    if names:
        if len(names) != stages - 1:
            raise PartitionError(
                f"split={names} makes {len(names) + 1} blocks for {stages} stages: write {stages - 1} names, or "
                f"stages={len(names) + 1}"
            )
        traced = partition_traced(body, names, path)
        return body, path, [Block(block, spreads=k < stages - 1) for k, block in enumerate(traced)]
    if not isinstance(body, nn.Sequential):
        raise PartitionError(
            f"{path} is a {type(body).__name__}, not an nn.Sequential: write the names of the submodules that start a "
            f"block, e.g. split={[child for child, _ in body.named_children()][1:stages]}, or define configure_stages()"
        )
    if split == "params":
        starts = balanced_starts([count_parameters(layer) for layer in body], stages)
    elif split == "time":
        starts = balanced_starts(measure(body), stages)
    else:
        starts = check_starts([int(start) for start in split], len(body), stages)
    return body, path, [Block(block) for block in partition_sequential(body, starts)]
