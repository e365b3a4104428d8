"""Batches from a queue, in the plainest way: what the coordinator's tests hand out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lightning_stale.coordinator.leases import Leases

Grant = tuple[int, int, int | None]


class QueueLeases(Leases):
    """Grants batches in order, as long as no more than ``open_at_once`` leases are open; the rest wait in line."""

    def __init__(self, batches: int, open_at_once: int) -> None:
        self.queue = deque(range(batches))
        self.held: dict[int, tuple[int, int]] = {}  # lease -> member, batch
        self.committed: list[int] = []
        self.line: list[int] = []
        self._open_at_once = open_at_once
        self._next = 0

    def request(self, member: int, now: float) -> tuple[int, int | None] | None:
        if len(self.held) >= self._open_at_once or (not self.queue and self.held):  # one of these may come back
            self.line.append(member)
            return None
        return self._grant(member)

    def _grant(self, member: int) -> tuple[int, int | None]:
        if not self.queue:
            return -1, None
        lease, batch = self._next, self.queue.popleft()
        self._next += 1
        self.held[lease] = (member, batch)
        return lease, batch

    def stale(self, member: int, leases: Sequence[int]) -> int | None:
        return next((lease for lease in leases if self.held.get(lease, (-1, -1))[0] != member), None)

    def commit(self, member: int, leases: Sequence[int], now: float) -> list[Grant]:
        self.committed += [self.held.pop(lease)[1] for lease in leases]
        return self._serve()

    def take_back(self, member: int, now: float) -> list[Grant]:
        self.line = [waiting for waiting in self.line if waiting != member]
        mine = [lease for lease, (holder, _) in self.held.items() if holder == member]
        self.queue.extendleft(reversed([self.held.pop(lease)[1] for lease in mine]))
        return self._serve()

    def _serve(self) -> list[Grant]:
        grants: list[Grant] = []
        while self.line and len(self.held) < self._open_at_once and (self.queue or not self.held):
            member = self.line.pop(0)
            grants.append((member, *self._grant(member)))
        return grants
