"""Who waits for the OK of its last push, by the clock at which it waits."""

from __future__ import annotations

import heapq


class Waiting(dict[int, int]):
    """Worker to the clock at which it waits, oldest first.

    Who is released when the gate opens up to a clock is found without a look at those who go on waiting.

    Example::

        >>> from lightning_stale.paradigms.waiting import Waiting
        >>> waiting = Waiting()
        >>> waiting.add(3, clock=5), waiting.add(1, clock=4), waiting.add(2, clock=7)
        (None, None, None)
        >>> waiting.release(up_to=5), list(waiting)
        ([3, 1], [2])
    """

    def __init__(self) -> None:
        super().__init__()
        self._at: dict[int, dict[int, int]] = {}  # clock -> worker -> its place in the line
        self._clocks: list[int] = []  # a heap of those in _at
        self._places = 0

    def add(self, worker: int, clock: int) -> None:
        """Let ``worker`` wait behind all others."""
        self[worker] = clock
        if clock not in self._at:
            self._at[clock] = {}
            heapq.heappush(self._clocks, clock)
        self._at[clock][worker] = self._places
        self._places += 1

    def drop(self, worker: int) -> None:
        """Forget ``worker``, if it waits."""
        clock = self.pop(worker, None)
        if clock is not None:
            del self._at[clock][worker]

    def release(self, up_to: float) -> list[int]:
        """Forget, and return oldest first, who waits at a clock of ``up_to`` or less."""
        if not self._clocks or self._clocks[0] > up_to:
            return []
        due: list[tuple[int, int]] = []
        while self._clocks and self._clocks[0] <= up_to:
            due += [(place, worker) for worker, place in self._at.pop(heapq.heappop(self._clocks)).items()]
        due.sort()  # of one clock they are in order already
        for _, worker in due:
            del self[worker]
        return [worker for _, worker in due]
