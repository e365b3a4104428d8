"""Bytes on their way to the workers, a few chunks ahead of what each has received: no model waits in a queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_stale.transport import wire

WINDOW = 8
"""Chunks that are sent before the first of them is asked to be followed by ``"more"``."""

Piece = tuple[int, Tensor]
"""Bytes (one-dimensional, ``torch.uint8``), and their offset at the receiver's."""


@dataclass
class _Delivery:
    pieces: list[Piece]
    place: int = 0
    start: int = 0
    own: bool = False  # whether the memory of the pieces is nobody else's

    def take_chunk(self) -> tuple[int, memoryview] | None:
        """Return the next chunk with its offset, or ``None`` after the last one."""
        while self.place < len(self.pieces):
            offset, data = self.pieces[self.place]
            start, end = self.start, min(self.start + wire.CHUNK_BYTES, data.numel())
            if start < end:
                self.start = end
                return offset + start, memoryview(data.numpy())[start:end]  # type: ignore[arg-type]
            self.place, self.start = self.place + 1, 0
        return None


class Deliveries:
    """One delivery at a time for each receiver, straight from the memory of weights and optimizer state.

    Args:
        send: gives a receiver the chunk of bytes that belongs at an offset; the bytes may change when it returns.
    """

    def __init__(self, send: Callable[[bytes, int, memoryview], None]) -> None:
        self._send = send
        self._open: dict[bytes, _Delivery] = {}

    def begin(self, receiver: bytes, pieces: Sequence[Piece]) -> None:
        """Send the first chunks of ``pieces``; of a delivery before, the receiver wants no more."""
        self._open[receiver] = _Delivery(list(pieces))
        for _ in range(WINDOW):
            self.send_more(receiver)

    def send_more(self, receiver: bytes) -> None:
        """Send the next chunk, if there is one."""
        delivery = self._open.get(receiver)
        if delivery is None:
            return
        chunk = delivery.take_chunk()
        if chunk is None:
            del self._open[receiver]
        else:
            self._send(receiver, *chunk)

    def end(self, receiver: bytes) -> None:
        """Forget a receiver that is gone."""
        self._open.pop(receiver, None)

    def keep(self) -> None:
        """Copy what is still to be sent; call before the memory that it lies in changes.

        So every receiver gets the weights of one version, and those that get the same ones share a copy.
        """
        copies: dict[tuple[int, int], Tensor] = {}
        for delivery in self._open.values():
            if delivery.own:
                continue
            delivery.own = True
            for place in range(delivery.place, len(delivery.pieces)):
                offset, data = delivery.pieces[place]
                key = (data.data_ptr(), data.numel())
                if key not in copies:
                    copies[key] = data.clone()
                delivery.pieces[place] = (offset, copies[key])
