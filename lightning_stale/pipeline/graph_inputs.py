"""Where the graph of a block begins: its inputs without what made them, and the gradients that come out there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GraphInputs:
    """Inputs of a block, each requiring a gradient if the given tensor does.

    Gradients are taken as autograd passes them on: ``Tensor.grad`` would have the strides of its tensor, and kernels
    of the block before would round otherwise than in one graph.

    Args:
        given: what a stage before has made, or data.
        data: none of them requires a gradient.
    """

    def __init__(self, given: Sequence[Tensor], data: bool) -> None:
        self._gradients: dict[int, Tensor] = {}
        self.tensors: list[Tensor] = []
        """The inputs."""
        self._indices: list[int] = []
        for index, tensor in enumerate(given):
            inner = tensor.detach()
            if tensor.requires_grad and not data:
                inner = _Begin.apply(inner.requires_grad_(), self._gradients, index)  # type: ignore[no-untyped-call]
                self._indices.append(index)
            self.tensors.append(inner)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of each input that requires one, so far; ``None`` where nothing depends on it."""
        return [self._gradients.get(index) for index in self._indices]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradients: dict[int, Tensor], index: int) -> Tensor:
        ctx.gradients, ctx.index = gradients, index
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        gradient, before = incoming[0], ctx.gradients.get(ctx.index)
        ctx.gradients[ctx.index] = gradient if before is None else before + gradient
        return None, None, None
