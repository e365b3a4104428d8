"""The leases of ranks that average in rounds: trained by each for itself, and committed when the round is."""

from __future__ import annotations

from lightning_stale.coordinator.leases import NONE_LEFT, EpochLeases, Grant


class RoundLeases(EpochLeases):
    """Leases whose changes are under way stay open, and count as progress: they are the kept ones.

    No member can be lost and the run go on, so no batch comes back: who finds none left is told so at once, as it has
    to take part in the rounds of those who still compute one. Where all meet, all of it will have been averaged.

    Args:
        workers: how many ranks there are.

    Example::

        >>> from lightning_stale.coordinator.leases import Plan
        >>> from lightning_stale.coordinator.round_leases import RoundLeases
        >>> leases = RoundLeases(workers=2)
        >>> leases.open(Plan(epoch=0, batches=2, each=1, steps=1, until=1), members={0, 1})
        >>> [(_, first)], [(_, second)] = leases.request(0), leases.request(1)
        >>> leases.note_kept([first.lease])
        >>> leases.committed, leases.request(0)   # rank 1 still computes
        (0, [(0, Grant(lease=-1, first=2, last=2, step=1, ahead=(), taken=0, most=0))])
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)

    @property
    def step(self) -> int:
        """How far the epoch is, in steps of every worker, those that are not averaged yet included."""
        if self.plan is None:
            return 0
        return min(-(-(self.committed + len(self._kept_back)) // self._workers), self.plan.until - 1)

    def _none_left(self) -> Grant | None:
        if self.plan is None:
            return None
        return Grant(NONE_LEFT, self.plan.batches, self.plan.batches, self.plan.until)
