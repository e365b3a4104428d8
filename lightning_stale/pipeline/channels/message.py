"""What one message consists of: a header, a description if it is another one than before, and bytes of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import torch
from torch import Tensor

from lightning_stale.pipeline.values import strides
from lightning_stale.pipeline.values.trees import Tree, take_apart

DATA, CLOSE = 0, 1
"""Kinds of messages."""
_HEADER = 3


class Header(NamedTuple):
    """Begins each message, as int64."""

    batch: int
    length: int
    """Bytes of the description that follows; 0: that of the message before."""
    kind: int

    def pack(self) -> Tensor:
        """Return it to be sent."""
        return torch.tensor(list(self))

    @staticmethod
    def empty() -> Tensor:
        """Return what one is received into."""
        return torch.empty(_HEADER, dtype=torch.int64)


class Form(NamedTuple):
    """What there is to know of a tensor besides its elements."""

    dtype: str
    shape: list[int]
    stride: list[int]
    on_cpu: bool
    """Though others of the same message are on a GPU: the lengths of a packed sequence, say."""
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return that of ``tensor``."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        on_cpu = tensor.device.type == "cpu"
        return cls(dtype, list(tensor.shape), list(tensor.stride()), on_cpu, tensor.requires_grad)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes: those of :func:`~lightning_stale.pipeline.values.strides.flat`."""
        size: int = 0 if 0 in self.shape else strides.flat_size(self.shape, self.stride) * self._kind.itemsize
        return size

    def tensor(self, received: Tensor) -> Tensor:
        """Return the tensor whose bytes are ``received``, on their device."""
        if 0 in self.shape:
            return torch.empty_strided(self.shape, self.stride, dtype=self._kind, device=received.device)
        return strides.restored(received.view(self._kind), self.shape, self.stride)

    @property
    def _kind(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.dtype)
        return kind


def describe(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return what it takes to put ``value`` together again, and its tensors.

    Raises:
        TypeError: names what cannot travel.
    """
    tree, tensors = take_apart(value)
    forms = [list(Form.of(tensor)) for tensor in tensors]
    packed: bytes = msgpack.packb([tree, forms], use_bin_type=True, strict_types=True)
    return packed, tensors


def described(packed: bytes) -> tuple[Tree, list[Form]]:
    """Return the tree and the forms of the tensors that :func:`describe` has described."""
    tree, forms = msgpack.unpackb(packed, raw=False)
    return tree, [Form(*form) for form in forms]
