"""One direction between two stages, as times: when a message arrives, and until when its sender waits."""

from __future__ import annotations

import math
from collections.abc import Callable


class TimedChannel:
    """What :mod:`lightning_stale.pipeline.channels.process` does, message by message.

    A message leaves once the one before has arrived and the receiver has room: for ``length`` messages that wait there,
    and for the one that it is asking for. The sender goes on while no more than ``length`` wait to leave.

    Args:
        length: of the queue, ``p_k`` or ``q_k``; ``inf`` where nobody waits for room.
        message_s: how long message number ``i`` is on its way, in seconds.

    Example::

        >>> from lightning_stale.simulation.pipeline.channel import TimedChannel
        >>> channel = TimedChannel(length=0, message_s=lambda i: 0.5)
        >>> channel.send(1.0)
        >>> channel.arrival(0) is None  # a locked direction: nobody has asked for it yet
        True
        >>> channel.ask(3.0)
        >>> channel.arrival(0), channel.free(0)
        (3.5, 3.5)
    """

    def __init__(self, length: float, message_s: Callable[[int], float]) -> None:
        self._length, self._message_s = length, message_s
        self._sent: list[float] = []
        self._asked: list[float] = []
        self._arrived: list[float] = []

    def send(self, now: float) -> None:
        """The sender has the next message."""
        self._sent.append(now)
        self._move()

    def ask(self, now: float) -> None:
        """The receiver waits for the next message."""
        self._asked.append(now)
        self._move()

    def arrival(self, number: int) -> float | None:
        """Return when a message has arrived; ``None`` while that hangs on what has not happened yet."""
        return self._arrived[number] if number < len(self._arrived) else None

    def free(self, number: int) -> float | None:
        """Return from when on nothing of the channel keeps the sender of message ``number``, likewise."""
        if number < self._length:
            return -math.inf
        return self.arrival(number - int(self._length))

    def _move(self) -> None:
        while (number := len(self._arrived)) < len(self._sent):
            room = 0.0
            if number >= self._length:
                asked = number - int(self._length)
                if asked >= len(self._asked):
                    return
                room = self._asked[asked]
            leaves = max(self._sent[number], room, self._arrived[-1] if self._arrived else 0.0)
            self._arrived.append(leaves + self._message_s(number))
