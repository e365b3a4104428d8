"""A tensor as one flat piece of memory and back with the same strides, on which kernels and their rounding depend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WIDEST_GAPS = 4  # elements of memory per element of the tensor: a third of a joint q, k, v keeps its gaps


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of ``tensor``, each place in memory once, as one dimension; a view where that is possible.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.values.strides import flat, restored
        >>> image = torch.arange(8.0).view(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        >>> flat(image).tolist()
        [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
        >>> restored(flat(image), image.shape, image.stride()).stride() == image.stride()
        True
    """
    small = _unexpanded(tensor.detach())
    if _is_dense(small.shape, small.stride()):
        small = small.as_strided((small.numel(),), (1,), small.storage_offset())
    return small.resolve_conj().resolve_neg().contiguous().view(-1)


def flat_size(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements :func:`flat` gives."""
    return torch.Size(_sizes(shape, strides)).numel()


def restored(elements: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return the tensor of ``shape`` and ``strides`` whose :func:`flat` is ``elements``.

    Where it overlaps with itself or leaves most of its memory out, it is contiguous instead.
    """
    sizes = _sizes(shape, strides)
    if _is_dense(sizes, strides):
        small = elements.as_strided(sizes, strides)
    else:
        small = elements.view(sizes)
        if _has_gaps(sizes, strides):
            small = torch.empty_strided(sizes, list(strides), dtype=elements.dtype, device=elements.device).copy_(small)
    return small.expand(list(shape))


def copied(tensor: Tensor) -> Tensor:
    """Return a copy with the strides of ``tensor``, through which gradients flow."""
    if tensor.layout is not torch.strided:
        return tensor.clone()
    if tensor.numel() != flat_size(tensor.shape, tensor.stride()):
        copy: Tensor = _ExpandedCopy.apply(tensor)  # type: ignore[no-untyped-call]
        return copy
    if _extent(tensor.shape, tensor.stride()) in (None, tensor.numel()):
        return tensor.clone()
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


class _ExpandedCopy(torch.autograd.Function):
    """Copies an expanded tensor as one; each of its elements has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return copied(_unexpanded(tensor)).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _unexpanded(tensor: Tensor) -> Tensor:
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _sizes(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [1 if stride == 0 and size > 1 else size for size, stride in zip(shape, strides, strict=True)]


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return how much memory the elements span; ``None`` if some share their place."""
    extent = 1
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride < extent:
            return None
        extent += stride * (size - 1)
    return extent


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    return _extent(sizes, strides) == torch.Size(sizes).numel()


def _has_gaps(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    extent, elements = _extent(sizes, strides), torch.Size(sizes).numel()
    return extent is not None and elements < extent <= _WIDEST_GAPS * elements
