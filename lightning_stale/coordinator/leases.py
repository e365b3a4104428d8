"""Which worker has which batch of the epoch: what the coordinator asks of who hands them out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Leases(ABC):
    """Hands out batches, one lease each.

    A push carries the leases whose gradients it contains; to commit them is the only way in which a batch becomes
    trained. A lease that is taken back returns its batch, which is granted again under another number.
    """

    @abstractmethod
    def request(self, member: int, now: float) -> tuple[int, int | None] | None:
        """Return (lease, batch) for ``member``, batch ``None`` if no batch is left, or ``None`` if it has to wait."""

    @abstractmethod
    def stale(self, member: int, leases: Sequence[int]) -> int | None:
        """Return the first of ``leases`` that ``member`` does not hold (any more), if there is one."""

    @abstractmethod
    def commit(self, member: int, leases: Sequence[int], now: float) -> list[tuple[int, int, int | None]]:
        """Note that they are trained; return who is granted what for it: (member, lease, batch)."""

    @abstractmethod
    def take_back(self, member: int, now: float) -> list[tuple[int, int, int | None]]:
        """Return the batches of ``member``, which is gone; return who is granted what for it."""
