"""Where each parameter lies in one flat buffer of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector instruction


@dataclass(frozen=True)
class Slot:
    """One tensor in the buffer: offset and length in bytes, shape and stride in elements."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor of this slot over ``buffer`` (one-dimensional, ``torch.uint8``), without a copy.

        Its storage ends with it, so that saving it does not save the whole buffer.
        """
        dtype = getattr(torch, self.dtype)
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        memory = memoryview(buffer.numpy())  # type: ignore[arg-type]
        flat = torch.frombuffer(memory, dtype=dtype, offset=self.offset, count=self.nbytes // dtype.itemsize)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Layout:
    """The slots of a list of tensors, in their order; gradients and weights use the same one.

    Example::

        >>> import torch
        >>> from lightning_stale.transport.layout import Layout
        >>> layout = Layout.of([torch.zeros(3, 2), torch.zeros(5)])
        >>> layout.nbytes, [slot.offset for slot in layout.slots]
        (128, [0, 64])
        >>> buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        >>> [tuple(view.shape) for view in layout.views(buffer)]
        [(3, 2), (5,)]
    """

    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Length of the buffer in bytes (at least one slot's worth, so that it can be mapped)."""
        end = self.slots[-1].offset + self.slots[-1].nbytes if self.slots else 0
        return max(ALIGNMENT, _aligned(end))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """Lay out ``tensors`` one after the other; strides are kept where the tensor is dense."""
        slots, offset = [], 0
        for tensor in tensors:
            dense = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
            nbytes = tensor.numel() * tensor.element_size()
            dtype = str(tensor.dtype).removeprefix("torch.")
            slots.append(Slot(offset, nbytes, dtype, tuple(tensor.shape), dense.stride()))
            offset = _aligned(offset + nbytes)
        return cls(tuple(slots))

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return one tensor per slot over ``buffer``."""
        return [slot.view(buffer) for slot in self.slots]

    def ranges(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return the (start, end) byte ranges that cover the slots ``indices``, neighbours merged."""
        merged: list[tuple[int, int]] = []
        for slot in (self.slots[i] for i in sorted(indices)):
            if merged and slot.offset == _aligned(merged[-1][1]):
                merged[-1] = (merged[-1][0], slot.offset + slot.nbytes)
            else:
                merged.append((slot.offset, slot.offset + slot.nbytes))
        return merged

    def to_message(self) -> list[list[Any]]:
        """Return plain lists, from which :meth:`from_message` makes the same layout."""
        return [list(asdict(slot).values()) for slot in self.slots]

    @classmethod
    def from_message(cls, message: Sequence[Sequence[Any]]) -> Layout:
        """The inverse of :meth:`to_message`."""
        return cls(tuple(Slot(o, n, dtype, tuple(shape), tuple(stride)) for o, n, dtype, shape, stride in message))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
