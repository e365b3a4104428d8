"""The smallest bounded delay that keeps unequal workers from waiting, found from how long their leases take."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

ROUNDS = 16
"""So many leases of the slowest worker are looked at; with 8, the delay found was twice as often off by one."""

FEW_ROUNDS = 8
"""The same where there are so many workers that each round tells as much as many of a few."""

GRAIN = 64
"""From twice so many workers on, the delay is looked for in steps of their number over this one, not one by one."""


def waiting_share(durations: Sequence[Sequence[float]], delay: int) -> float:
    """Return which share of their time workers wait for a grant, from when the delay has made itself felt.

    A worker's durations come again and again in their order, and nothing but them takes time. Lease ``t`` goes to the
    worker that has been free for longest, say since ``F``, and ends at ``C_t``. It begins at ``F``, but not before all
    leases up to ``t - delay`` have ended: at ``max(F, C_0, ..., C_(t - delay))``.

    Args:
        durations: of each worker: how long some of its leases took, in seconds.
        delay: R of :class:`~lightning_stale.BoundedDelay`.

    Example::

        >>> from lightning_stale.paradigms.adaptive_delay import waiting_share
        >>> waiting_share([[1.0], [3.0]], delay=4)
        0.0
        >>> round(waiting_share([[1.0], [3.0]], delay=2), 2)   # in 3 s, the faster has two leases
        0.17
    """
    slowest = 0  # and so before the others wherever times are equal, which needs the larger delay
    in_order = sorted(durations, key=lambda each: -sum(each) / len(each))
    work = [itertools.cycle(each).__next__ for each in in_order]
    free = [(0.0, worker) for worker in range(len(work))]
    ended: list[float] = []  # when all leases up to this one have
    latest = waited = worked = 0.0
    for _ in range(delay):  # nobody waits for these
        begin, worker = free[0]
        end = begin + work[worker]()
        heapq.heapreplace(free, (end, worker))
        latest = max(latest, end)
        ended.append(latest)
    rounds, enough = -1, max(FEW_ROUNDS, min(ROUNDS, ROUNDS * 2 * GRAIN // len(work)))
    for before in ended:  # grows as it goes on
        since, worker = free[0]
        begin = max(since, before)
        duration = work[worker]()
        end = begin + duration
        heapq.heapreplace(free, (end, worker))
        latest = max(latest, end)
        ended.append(latest)
        if rounds >= 0:
            waited += begin - since
            worked += duration
        if worker == slowest:
            rounds += 1
            if rounds == enough:
                break
    total = waited + worked
    return waited / total if total > 0 else 0.0


def smallest_delay(durations: Sequence[Sequence[float]], *, lower: int, upper: int, waiting: float, start: int) -> int:
    """Return the smallest delay of ``lower`` to ``upper`` with a :func:`waiting_share` below ``waiting``.

    The search goes out from ``start`` in steps that double, and then bisects: where little has changed, it takes two
    simulations, and none of a delay of more than twice what is needed. If ``upper`` is not enough, it is what there is.
    With many workers (:data:`GRAIN`), what is found may be one step more than the smallest.

    Example::

        >>> from lightning_stale.paradigms.adaptive_delay import smallest_delay
        >>> smallest_delay([[1.0], [1.0], [1.0], [4.0]], lower=4, upper=32, waiting=0.02, start=8)   # 1 + 3 * 4
        13
    """

    def suits(delay: int) -> bool:
        return waiting_share(durations, delay) < waiting

    step = grain = max(1, len(durations) // GRAIN)
    if suits(start):
        enough, short = start, max(start - step, lower - 1)
        while short >= lower and suits(short):
            step *= 2
            enough, short = short, max(short - step, lower - 1)
    else:
        short, enough = start, min(start + step, upper)
        while enough < upper and not suits(enough):
            step *= 2
            short, enough = enough, min(enough + step, upper)
    while enough - short > grain:
        middle = (short + enough) // 2
        short, enough = (short, middle) if suits(middle) else (middle, enough)
    return enough
