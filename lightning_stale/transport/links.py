"""How gradients and weights get from a worker to the server and back: one interface, over shared memory or a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stale.transport import memory, wire
from lightning_stale.transport.delivery import Piece

Ranges = Sequence[tuple[int, int]]
"""(start, end) in bytes of a buffer, as :meth:`~lightning_stale.transport.layout.Layout.ranges` returns them."""


class ServerLink(ABC):
    """A worker's two buffers, as the server sees them.

    Attributes:
        gradients: the bytes that the worker pushes.
        weights: the bytes that it holds, as far as it was given them; ``None``: nobody keeps them here.
    """

    gradients: Tensor
    weights: Tensor | None

    @abstractmethod
    def take(self, offset: int, data: memoryview) -> None:
        """Put bytes of a push, which have come as a message, where they belong.

        Raises:
            WireError: if bytes come so that do not here.
        """

    @abstractmethod
    def give(self, weights: Tensor, ranges: Ranges) -> list[Piece]:
        """Let the worker have ``ranges`` of ``weights``; return what is still to be sent to it."""

    def close(self) -> None:  # noqa: B027 - mostly nothing is open
        """The worker is gone; said again, it changes nothing."""


class WorkerLink(ABC):
    """A worker's two buffers, as it sees them itself.

    Attributes:
        shared: whether the server sees what is written into them.
        buffer: the bytes of both.
        gradients: the bytes that it pushes.
        weights: those that it pulls.
    """

    shared: bool

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        nbytes = buffer.numel() // 2
        self.gradients, self.weights = buffer[:nbytes], buffer[nbytes:]


# --- shared memory --------------------------------------------------------------------------------------------------


class SharedServerLink(ServerLink):
    """Memory that the worker has mapped too: what is written there has arrived.

    Args:
        segment: twice the bytes of the weights.
    """

    def __init__(self, segment: memory.Segment) -> None:
        nbytes = segment.data.numel() // 2
        self.segment = segment
        self._closed = False
        self.gradients = segment.data[:nbytes]
        self.weights: Tensor = segment.data[nbytes:]

    def take(self, offset: int, data: memoryview) -> None:
        raise wire.WireError(f"a chunk of {len(data)} bytes at {offset} from who shares its memory")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.segment.close()

    def give(self, weights: Tensor, ranges: Ranges) -> list[Piece]:
        if self.weights is not weights:  # one worker alone: they are the server's own
            for start, end in ranges:
                self.weights[start:end].copy_(weights[start:end])
        return []


class SharedWorkerLink(WorkerLink):
    """The other side of :class:`SharedServerLink`.

    Args:
        path, nbytes, token: of the segment.

    Raises:
        SharedMemoryError: if it cannot be reached from here.
    """

    shared = True

    def __init__(self, path: str, nbytes: int, token: bytes) -> None:
        super().__init__(memory.open_segment(path, nbytes, token))


# --- streams --------------------------------------------------------------------------------------------------------


class StreamServerLink(ServerLink):
    """Chunks over the worker's connection.

    Args:
        nbytes: of the weights.
        keeps: whether to keep what the worker is given.
    """

    def __init__(self, nbytes: int, keeps: bool = False) -> None:
        self.gradients = torch.zeros(nbytes, dtype=torch.uint8)
        self.weights = torch.zeros(nbytes, dtype=torch.uint8) if keeps else None

    def take(self, offset: int, data: memoryview) -> None:
        if offset < 0 or offset + len(data) > self.gradients.numel():
            raise wire.WireError(f"a chunk of {len(data)} bytes at {offset} that belongs to no push")
        self.gradients.numpy()[offset : offset + len(data)] = data

    def give(self, weights: Tensor, ranges: Ranges) -> list[Piece]:
        if self.weights is not None:
            for start, end in ranges:
                self.weights[start:end].copy_(weights[start:end])
        return [(start, weights[start:end]) for start, end in ranges]


class StreamWorkerLink(WorkerLink):
    """The other side of :class:`StreamServerLink`.

    Args:
        nbytes: of both buffers.
    """

    shared = False

    def __init__(self, nbytes: int) -> None:
        super().__init__(torch.zeros(nbytes, dtype=torch.uint8))
