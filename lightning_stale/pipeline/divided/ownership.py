"""Which tensors of a model each rank owns, and which all may read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_stale.pipeline.divided.tensors import named_tensors


def own_names(model: nn.Module, mine: Iterable[nn.Module], blocks: Iterable[nn.Module], with_rest: bool) -> set[str]:
    """Return the names of the tensors that a rank owns.

    Args:
        model: the whole model.
        mine: those of this rank.
        blocks: all of them.
        with_rest: whether what lies outside of all blocks is this rank's too (the last stage's).

    Example::

        >>> from torch import nn
        >>> from lightning_stale.pipeline.divided.ownership import own_names
        >>> model = nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))})
        >>> model["head"] = nn.Linear(2, 1, bias=False)
        >>> blocks = list(model["net"])
        >>> [sorted(own_names(model, [blocks[k]], blocks, with_rest=k == 1)) for k in range(2)]
        [['net.0.weight'], ['head.weight', 'net.1.weight']]
    """
    own = {id(tensor) for block in mine for _, tensor in named_tensors(block)}
    in_blocks = {id(tensor) for block in blocks for _, tensor in named_tensors(block)}
    return {
        name
        for name, tensor in named_tensors(model)
        if id(tensor) in own or (with_rest and id(tensor) not in in_blocks)
    }


def constant_names(model: nn.Module, blocks: Iterable[nn.Module]) -> set[str]:
    """Return the names of buffers and frozen parameters outside of all blocks: every rank may read them."""
    in_blocks = {id(tensor) for block in blocks for _, tensor in named_tensors(block)}
    return {name for name, tensor in named_tensors(model) if id(tensor) not in in_blocks and not tensor.requires_grad}
