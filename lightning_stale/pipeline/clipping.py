"""Clip each block by its own norm: no block knows another's gradient of the same batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


def clip_per_block(
    optimizer: Optimizer, blocks: Sequence[nn.Module], clip: Callable[[Sequence[Tensor]], object]
) -> None:
    """Call ``clip`` with the parameters of each block; what lies outside of all blocks belongs to the last.

    Those without a gradient are left out, as all of a block are while the pipeline fills: torch's
    ``clip_grad_value_`` fails on none.

    Args:
        optimizer: over the parameters of all blocks, and what lies outside of them.
        blocks: in order.
        clip: clips what it is given together, e.g. to a norm.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.clipping import clip_per_block
        >>> blocks = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for block, gradient in zip(blocks, (3.0, 0.5)):
        ...     block.weight.grad = torch.full((1, 1), gradient)
        >>> optimizer = torch.optim.SGD([block.weight for block in blocks], lr=0.1)
        >>> clip_per_block(optimizer, blocks, lambda group: torch.nn.utils.clip_grad_norm_(group, 1.0))
        >>> [round(block.weight.grad.item(), 3) for block in blocks]
        [1.0, 0.5]
    """
    block_of = {id(p): k for k, block in enumerate(blocks) for p in block.parameters()}
    groups: dict[int, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                groups.setdefault(block_of.get(id(parameter), len(blocks) - 1), []).append(parameter)
    for parameters in groups.values():
        clip(parameters)
