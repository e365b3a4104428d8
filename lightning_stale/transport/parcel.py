"""Nested values with tensors in them, as bytes of which the large ones are not copied. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
from torch import Tensor

from lightning_stale.transport.wire import WireError

_TENSOR, _TUPLE, _LARGE = 1, 2, 3
_LARGE_BYTES = 64 * 2**10
_ALIGNMENT = 64  # bytes, enough for every dtype


@dataclass
class Parcel:
    """A value as pieces of bytes, each with its offset in one buffer; the first is the head."""

    pieces: list[tuple[int, Tensor]]

    @property
    def head(self) -> int:
        """Bytes of the head."""
        return self.pieces[0][1].numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(data.numel() for _, data in self.pieces)

    @property
    def size(self) -> int:
        """Bytes of the buffer, with the gaps between the pieces."""
        offset, data = self.pieces[-1]
        return offset + data.numel()


def pack(value: Any) -> Parcel:
    """Return nested dicts, lists, tuples, numbers, strings and tensors as a parcel.

    Large tensors on the CPU are not copied: the parcel holds their memory as it is when it is read.

    Raises:
        WireError: for anything else, with its type.
    """
    large: list[tuple[int, Tensor]] = []
    head = _pack(value, large)
    start = _aligned(len(head))
    return Parcel([(0, _bytes_of(head)), *((start + offset, data) for offset, data in large)])


def unpack(buffer: Tensor, head: int) -> Any:
    """Return the value of the parcel whose pieces lie in ``buffer`` (``torch.uint8``); its large tensors stay there.

    Args:
        buffer: with all pieces at their offsets.
        head: bytes of the head.
    """
    memory = memoryview(buffer.numpy())  # type: ignore[arg-type]
    return _unpack(memory[:head], memory[_aligned(head) :])


def _pack(value: Any, large: list[tuple[int, Tensor]]) -> bytes:
    def pack_extension(value: Any) -> msgpack.ExtType:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            description = [str(value.dtype).removeprefix("torch."), list(value.shape)]
            if flat.numel() < _LARGE_BYTES:
                return msgpack.ExtType(_TENSOR, msgpack.packb([*description, flat.numpy().tobytes()]))
            offset = _aligned(large[-1][0] + large[-1][1].numel()) if large else 0
            large.append((offset, flat))
            return msgpack.ExtType(_LARGE, msgpack.packb([*description, offset]))
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, _pack(list(value), large))
        if isinstance(value, dict):  # a subclass, e.g. defaultdict
            return dict(value)
        raise WireError(
            f"{type(value).__module__}.{type(value).__qualname__} cannot travel between the parameter server and a "
            "worker: the state of an optimizer may hold tensors, numbers, strings, lists, tuples and dicts"
        )

    packed: bytes = msgpack.packb(value, default=pack_extension, strict_types=True, use_bin_type=True)
    return packed


def _unpack(packed: memoryview | bytes, large: memoryview) -> Any:
    def unpack_extension(code: int, data: bytes) -> Any:
        if code == _TUPLE:
            return tuple(_unpack(data, large))
        if code == _TENSOR:
            dtype, shape, raw = msgpack.unpackb(data, raw=False)
            return _tensor(bytearray(raw), 0, dtype, shape)
        if code == _LARGE:
            dtype, shape, offset = msgpack.unpackb(data, raw=False)
            return _tensor(large, offset, dtype, shape)
        raise WireError(f"extension {code}")

    return msgpack.unpackb(packed, ext_hook=unpack_extension, strict_map_key=False, raw=False)


def _tensor(memory: memoryview | bytearray, offset: int, name: str, shape: Sequence[int]) -> Tensor:
    dtype = getattr(torch, name)
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    # `frombuffer`, so that the storage ends with the tensor, and saving it does not save the whole parcel
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _bytes_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
