"""The clocks of the workers present: how many pushes each has made, and at once the smallest and the largest."""

from __future__ import annotations


class Clocks(dict[int, int]):
    """Worker to clock, in the order of joining.

    Nothing here takes longer with more workers: who is at which clock is known, so that the smallest and the largest
    need no search. Where the last one leaves the smallest or largest clock, the next one that somebody has is looked
    for step by step. Each step takes back one by which a push has driven the two apart, so all such steps together
    are no more than the pushes.

    Example::

        >>> from lightning_stale.paradigms.clocks import Clocks
        >>> clocks = Clocks()
        >>> clocks.join(0, at=0), clocks.join(1, at=0), clocks.advance(1), clocks.advance(1)
        (None, None, 1, 2)
        >>> clocks, clocks.smallest, clocks.largest
        ({0: 0, 1: 2}, 0, 2)
        >>> clocks.leave(0)
        >>> clocks.smallest, clocks.slowest
        (2, {1})
    """

    def __init__(self) -> None:
        super().__init__()
        self.smallest = self.largest = 0
        """Of those present; without any, they say nothing."""
        self._at: dict[int, set[int]] = {}

    @property
    def slowest(self) -> set[int]:
        """Who has the smallest clock."""
        return self._at[self.smallest]

    def join(self, worker: int, at: int) -> None:
        """Let ``worker``, which is not here, begin with the clock ``at``."""
        self.smallest = min(self.smallest, at) if self else at
        self.largest = max(self.largest, at) if self else at
        self[worker] = at
        self._at.setdefault(at, set()).add(worker)

    def advance(self, worker: int) -> int:
        """Count a push of ``worker``; return its clock."""
        before = self[worker]
        clock = self[worker] = before + 1
        if clock > self.largest:
            self.largest = clock
        at = self._at
        if clock in at:
            at[clock].add(worker)
        else:
            at[clock] = {worker}
        mine = at[before]
        mine.remove(worker)
        if not mine:
            del at[before]
            if before == self.smallest:  # it was the last one there, and is just above
                self.smallest = clock
        return clock

    def leave(self, worker: int) -> None:
        """Drop ``worker``."""
        clock = self.pop(worker)
        mine = self._at[clock]
        mine.remove(worker)
        if mine:
            return
        del self._at[clock]
        while self and self.smallest not in self._at:
            self.smallest += 1
        while self and self.largest not in self._at:
            self.largest -= 1
