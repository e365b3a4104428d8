"""The memory of a tensor, in the order in which it lies there."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_of(tensor: Tensor) -> Tensor:
    """Return the bytes of ``tensor`` in the order of its strides: its own memory, if it is dense and on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.stride() != dense_strides(tensor):
        tensor = torch.empty_strided(tensor.shape, dense_strides(tensor), dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of ``tensor`` without gaps, its dimensions in the order in which they lie there."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
