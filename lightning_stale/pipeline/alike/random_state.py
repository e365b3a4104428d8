"""The random state of a process as one value: torch's on the CPU and the GPUs, that of ``random``, and NumPy's."""

from __future__ import annotations

import hashlib
import random
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """What the global generators will draw next.

    Args:
        cpu: torch's on the CPU.
        cuda: torch's, by index of the GPU.
        python: that of ``random``.
        numpy: that of ``numpy.random``.

    Example::

        >>> import random
        >>> from lightning_stale.pipeline.alike.random_state import RandomState
        >>> state = RandomState.now()
        >>> first = random.random()
        >>> state.restore()
        >>> random.random() == first
        True
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, gpus: Iterable[int] = ()) -> RandomState:
        """Return the present one."""
        cuda = {index: torch.cuda.get_rng_state(index) for index in gpus}
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Make it the present one."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def pack(self) -> bytes:
        """Return it as bytes, for another process."""
        version, words, gauss = self.python
        kind, keys, *rest = self.numpy
        cuda = [state.numpy().tobytes() for _, state in sorted(self.cuda.items())]
        python = [version, array("I", words).tobytes(), gauss]
        numpy = [kind, keys.tobytes(), *rest]
        packed: bytes = msgpack.packb([self.cpu.numpy().tobytes(), cuda, python, numpy])
        return packed

    @classmethod
    def unpack(cls, packed: bytes, gpus: Sequence[int] = ()) -> RandomState:
        """Return what :meth:`pack` has packed; ``gpus``: those that take the place of the packing process'."""
        cpu, cuda, (version, words, gauss), (kind, keys, *rest) = msgpack.unpackb(packed)
        return cls(
            _as_tensor(cpu),
            {index: _as_tensor(state) for index, state in zip(gpus, cuda, strict=True)},
            (version, tuple(array("I", words)), gauss),
            (kind, np.frombuffer(keys, dtype=np.uint32), *rest),
        )

    def digest(self) -> bytes:
        """Return eight bytes that differ where the states do."""
        return hashlib.blake2b(self.pack(), digest_size=8).digest()


def derive(seed: bytes, path: Sequence[int], gpus: Iterable[int] = ()) -> None:
    """Have the global generators draw what follows from ``seed`` and ``path`` alone, whatever was drawn before.

    Args:
        seed: of the run.
        path: what the numbers are for: purpose, batch, stage, ...
        gpus: indices of the GPUs.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.alike.random_state import derive, kept
        >>> with kept():
        ...     derive(b"seed", (0, 7))
        ...     first = torch.rand(2)
        ...     derive(b"seed", (0, 7))
        ...     torch.equal(torch.rand(2), first)
        True
    """
    packed = struct.pack(f"{len(path)}q", *path)
    numbers = struct.unpack("Q6I2Q", hashlib.blake2b(packed, key=seed, digest_size=48).digest())
    torch.default_generator.manual_seed(numbers[0])
    for index in gpus:
        torch.cuda.default_generators[index].manual_seed(numbers[0])
    np.random.seed(np.array(numbers[1:7], dtype=np.uint32))
    random.seed((numbers[7] << 64) | numbers[8])


@contextmanager
def kept(gpus: Sequence[int] = ()) -> Iterator[None]:
    """Whatever is drawn within changes nothing of what is drawn afterwards."""
    state = RandomState.now(gpus)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on; the present state is kept."""
    with kept(list(state.cuda)):
        state.restore()
        yield


def _as_tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
