"""Dynamic stale synchronous parallel: the threshold adapts while training runs."""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_stale.paradigms.base import ClockGate, check_clock_count


@dataclass
class _Record:
    """What the controller knows of a worker since it joined (times in seconds)."""

    released_at: float
    pushes: int = 0
    last_push: float = -math.inf
    interval: float = 0.0  # the last processing time: from the OK to the next push
    credit: int = 0  # r_p


class DSSP(ClockGate):
    """Dynamic stale synchronous parallel: SSP(lower), and credit for the fastest worker (arXiv 1908.11848).

    When the fastest worker would have to wait, a controller predicts the next pushes of it and of the slowest worker
    from their last processing times, and lets the fastest run as many clocks ahead (at most ``upper - lower``) as make
    it wait least (Algorithms 1 and 2).

    Args:
        lower: the lead, in clocks, up to which every worker goes on.
        upper: the largest lead that credit may lead to.
        enforce_upper: ``True``: a grant is clipped to ``upper - lead + 1``, so that no worker is ever released with a
            lead above ``upper``; a grant of r is r OKs, the one that comes with it included. ``False``: the algorithm
            as printed, which may grant again when the credit runs out: under a lasting speed difference the lead grows
            without bound, as with ASP.

    Raises:
        ValueError: if a threshold is not an integer >= 0, or ``lower > upper``.

    Example::

        >>> from lightning_stale import DSSP
        >>> DSSP(lower=3, upper=15)
        DSSP(lower=3, upper=15, enforce_upper=True)
    """

    def __init__(self, lower: int = 3, upper: int = 15, enforce_upper: bool = True) -> None:
        super().__init__()
        self.lower, self.upper = _check_thresholds(lower, upper)
        if not isinstance(enforce_upper, bool):
            raise ValueError(f"DSSP(enforce_upper={enforce_upper!r}): write True or False")
        self.enforce_upper = enforce_upper
        self._records: dict[int, _Record] = {}
        self._places: dict[int, int] = {}  # of those present, in the order in which they joined
        self._next_place = itertools.count()
        self._slowest: list[tuple[float, int, int]] = []  # a heap of who has, or had, the clock below: last push, place
        self._slowest_at = -1

    @classmethod
    def from_ssp(cls, threshold: int = 3, upper: int = 15, enforce_upper: bool = True) -> DSSP:
        """Return ``SSP(threshold)`` with credit up to ``upper`` (in configs: ``adaptation=dssp``).

        Example::

            >>> from lightning_stale import DSSP
            >>> DSSP.from_ssp(threshold=5)
            DSSP(lower=5, upper=15, enforce_upper=True)
        """
        return cls(lower=threshold, upper=upper, enforce_upper=enforce_upper)

    @property
    def bound(self) -> int:  # type: ignore[override]
        return self.lower

    def join(self, worker: int, now: float) -> None:
        super().join(worker, now)
        self._records[worker] = _Record(released_at=now)
        self._note_joined(worker)

    def push(self, worker: int, now: float) -> list[int]:
        record = self._records.get(worker)
        if record is not None and worker not in self._waiting:
            record.pushes += 1
            record.interval = now - record.released_at
            record.last_push = now
        return self._note_release(super().push(worker, now), now)

    def leave(self, worker: int, now: float) -> list[int]:
        released = self._note_release(super().leave(worker, now), now)
        del self._records[worker], self._places[worker]
        return released

    def controller(self, worker: int, now: float) -> int:
        """Return how many clocks ``worker``, which pushes at ``now``, should run on before it waits (Algorithm 2).

        The pushes of ``worker`` are predicted at ``now + i * I_p`` and those of the slowest at
        ``last_push_s + (k + 1) * I_s`` with ``i, k = 0..upper - lower``; the ``i`` with the smallest distance to any
        ``k`` wins, the smallest such ``i`` on ties. Zero while either has pushed fewer than twice.
        """
        fast = self._records[worker]
        slow = self._records[self._find_slowest()]
        if fast.pushes < 2 or slow.pushes < 2:
            return 0
        horizon = range(self.upper - self.lower + 1)
        slow_pushes = sorted(slow.last_push + (k + 1) * slow.interval for k in horizon)

        def wait(i: int) -> float:
            push = now + i * fast.interval
            after = bisect_left(slow_pushes, push)
            return min(abs(slow_push - push) for slow_push in slow_pushes[max(0, after - 1) : after + 1])

        return min(horizon, key=wait)

    def _find_slowest(self) -> int:
        """Return who has the smallest clock; of several, whose last push is oldest; of these, who joined first.

        Who has the smallest clock has it until it pushes. So the heap of those is made once for each smallest clock,
        who joins comes to it, and who has pushed or left is passed over.
        """
        clocks = self._clocks
        if self._slowest_at != clocks.smallest:
            self._slowest_at = clocks.smallest
            self._slowest = [self._age(worker) for worker in clocks.slowest]
            heapq.heapify(self._slowest)
        while True:
            _, place, worker = self._slowest[0]
            if self._places.get(worker) == place and clocks[worker] == clocks.smallest:
                return worker
            heapq.heappop(self._slowest)

    def _age(self, worker: int) -> tuple[float, int, int]:
        return self._records[worker].last_push, self._places[worker], worker

    def _note_joined(self, worker: int) -> None:
        self._places[worker] = next(self._next_place)
        if self._slowest_at == self._clocks[worker]:
            heapq.heappush(self._slowest, self._age(worker))

    @property
    def thresholds(self) -> dict[str, int]:
        return {"lower": self.lower, "upper": self.upper}

    def _change_thresholds(self, now: float, thresholds: Mapping[str, int]) -> list[int]:
        """Credit granted before is cut to what ``upper`` leaves; as printed, nothing bounds it and it stays."""
        self.lower, self.upper = _check_thresholds(thresholds["lower"], thresholds["upper"])
        if self.enforce_upper:
            for worker, record in self._records.items():
                record.credit = min(record.credit, max(0, self.upper - self.lead(worker)))
        return self._note_release(self._open_waiting(now), now)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "records": {worker: asdict(record) for worker, record in self._records.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._records = {int(worker): _Record(**record) for worker, record in state["records"].items()}
        self._places.clear()
        self._slowest_at = -1
        for worker in self._clocks:
            self._note_joined(worker)

    def _opens(self, worker: int, now: float) -> bool:
        record = self._records[worker]
        if record.credit > 0:
            record.credit -= 1
            return True
        if self._within_bound(worker):
            return True
        if self._clocks[worker] < self._clocks.largest:
            return False
        grant = self.controller(worker, now)
        if self.enforce_upper:
            grant = min(grant, self.upper - self.lead(worker) + 1)
        if grant <= 0:
            return False
        record.credit = grant - 1 if self.enforce_upper else grant
        return True

    def _note_release(self, released: list[int], now: float) -> list[int]:
        for worker in released:
            self._records[worker].released_at = now
        return released

    def __repr__(self) -> str:
        return f"DSSP(lower={self.lower}, upper={self.upper}, enforce_upper={self.enforce_upper})"


def _check_thresholds(lower: object, upper: object) -> tuple[int, int]:
    low, up = check_clock_count("DSSP", "lower", lower), check_clock_count("DSSP", "upper", upper)
    if low > up:
        raise ValueError(
            f"DSSP(lower={low}, upper={up}): lower must not exceed upper; did you mean DSSP(lower={up}, upper={low})?"
        )
    return low, up
