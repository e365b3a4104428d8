"""One direction between two stages: what it promises, and the one between two stages of the same process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_POLL_S = 0.5
_BREAK_OFF_S = 10.0


class ChannelError(RuntimeError):
    """The neighbouring stage is gone, or has sent something else than this one expects."""


class Channel(ABC):
    """One direction between two stages: first in, first out; every message carries its batch."""

    @abstractmethod
    def send(self, batch: int, value: Any) -> None:
        """Send ``value``, a tree of tensors and plain values; wait only while the queue is full."""

    @abstractmethod
    def receive(self, batch: int) -> Any:
        """Return the next value, which must be that of ``batch``.

        Raises:
            ChannelError: if it is not, or the neighbour has ended.
        """

    def queued(self) -> int:
        """Return how many messages have come and wait to be received."""
        return 0

    def close(self) -> None:  # noqa: B027
        """Send no more than what waits to be sent; receive no more, and let the sender come to its end."""

    def widen(self, length: int) -> None:  # noqa: B027
        """Let so many more messages wait to be received."""

    def join(self, timeout: float) -> bool:
        """Wait, after :meth:`close`, until nothing of it runs any more, at most ``timeout`` seconds; say whether."""
        return True

    def break_off(self) -> None:  # noqa: B027
        """Let the thread end at once; the neighbour's ends too."""


class MemoryChannel(Channel):
    """Between two stages of one process.

    Example::

        >>> from lightning_stale.pipeline.channels.channel import MemoryChannel
        >>> channel = MemoryChannel()
        >>> channel.send(0, "features")
        >>> channel.receive(1)
        Traceback (most recent call last):
        lightning_stale.pipeline.channels.channel.ChannelError: a message of batch 0 where that of batch 1 was expected
    """

    def __init__(self) -> None:
        self._messages: deque[tuple[int, Any]] = deque()

    def send(self, batch: int, value: Any) -> None:
        self._messages.append((batch, value))

    def receive(self, batch: int) -> Any:
        return checked(batch, *self._messages.popleft())

    def queued(self) -> int:
        return len(self._messages)


def end(channels: Iterable[Channel], check: Callable[[], object]) -> None:
    """End ``channels`` once everything has been sent, and the neighbours have ended theirs.

    Args:
        channels: of this process.
        check: called now and then while waiting; raises to break off.
    """
    channels = list(channels)
    try:
        for channel in channels:
            channel.close()
        for channel in channels:
            while not channel.join(_POLL_S):
                check()
    finally:
        break_off_all(channels)


def break_off_all(channels: Iterable[Channel]) -> None:
    """End those of ``channels`` at once that have not ended."""
    for channel in channels:
        if not channel.join(0.0):
            channel.break_off()
            channel.join(_BREAK_OFF_S)


def checked(expected: int, batch: int, value: Any) -> Any:
    """Return ``value``, a message of ``batch``, where that of ``expected`` should come.

    Raises:
        ChannelError: if it is another one; below 0 stands the end, after ``-1 - n`` batches.
    """
    if batch != expected and min(batch, expected) < 0:
        counts = ["another one" if n >= 0 else f"{-1 - n} batches and no more" for n in (expected, batch)]
        raise ChannelError(
            f"the loaders of neighbouring stages end differently: {counts[0]} on this rank, {counts[1]} on the other "
            "one. All stages together are one replica: yield the same batches on every rank"
        )
    if batch != expected:
        raise ChannelError(f"a message of batch {batch} where that of batch {expected} was expected")
    return value
