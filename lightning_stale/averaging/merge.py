"""What becomes of the replica when the global weights have changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(global weights ``W_k``, local change ``D_k`` since the launch, out) -> out, the replica ``x`` that goes on."""


def hpsgd(weights: Tensor, change: Tensor, out: Tensor) -> Tensor:  # noqa: ARG001
    """The replica becomes the global weights (arXiv 2009.02701); the local change comes back one round later."""
    return out.copy_(weights)


def cocod(weights: Tensor, change: Tensor, out: Tensor) -> Tensor:
    """The replica keeps its progress since the launch on top of the global weights (CoCoD-SGD, arXiv 1906.12043)."""
    return torch.sub(weights, change, out=out)


MERGES: dict[str, Merge] = {"hpsgd": hpsgd, "cocod": cocod}
