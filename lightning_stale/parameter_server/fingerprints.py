"""Checksums of a push: the same where the gradients are the same bit for bit, and they say which is not."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stale.events import Fingerprint
from lightning_stale.parameter_server.dense import memory_of
from lightning_stale.parameter_server.options import Options

_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads what differs in few bits
_MASK = 2**64 - 1


def fingerprint(at: float, worker: int, gradients: Sequence[Tensor | None], options: Options) -> Fingerprint:
    """Return the checksums of a push.

    A tensor's is the sum of its bytes as 64-bit integers, at the speed of memory: two gradients that differ in any bit
    have another one but where differences cancel each other.

    Args:
        at: the time, in seconds.
        worker: whose it is.
        gradients: one tensor per parameter of the optimizer; ``None``: it has none.
        options: the values of its param groups.

    Example::

        >>> import torch
        >>> from lightning_stale.parameter_server.fingerprints import fingerprint
        >>> one, other = (fingerprint(0.0, 0, [torch.ones(3), torch.full((2,), x)], [{"lr": 0.1}]) for x in (1.0, 2.0))
        >>> one.gradients == other.gradients, one.options == other.options
        (False, True)
        >>> [mine == its for mine, its in zip(one.parameters, other.parameters)]
        [True, False]
    """
    whole, parameters = 0, bytearray()
    for place, gradient in enumerate(gradients, 1):
        mixed = 0 if gradient is None else checksum(gradient)
        whole = (whole + place * mixed) & _MASK
        parameters.append(mixed >> 56)
    return Fingerprint(at, worker, whole >> 32, zlib.crc32(repr(options).encode()), bytes(parameters))


def checksum(tensor: Tensor) -> int:
    """Return that of one tensor, 64 bits.

    Args:
        tensor: on the CPU.
    """
    return (_sum(tensor) + tensor.numel() + 1) * _ODD & _MASK


def _sum(tensor: Tensor) -> int:
    data = memory_of(tensor)
    words = data.numel() // 8 * 8
    rest = int.from_bytes(data[words:].numpy().tobytes(), "little")
    whole = data[:words]
    if whole.data_ptr() % 8 or whole.storage_offset() % 8:  # a view of words begins where words do
        whole = whole.clone()
    return int(whole.view(torch.int64).sum()) + rest
