"""Bulk synchronous parallel: one averaged step per round."""

from __future__ import annotations

from typing import ClassVar

from lightning_stale.paradigms.base import ClockGate


class BSP(ClockGate):
    """Bulk synchronous parallel: all workers meet at every clock, and one step with the mean gradient is taken.

    The gate is that of SSP(0); what differs is the step: one with the mean of the round instead of one per push.
    Equals DDP.

    Example::

        >>> from lightning_stale import BSP
        >>> paradigm = BSP()
        >>> for worker in (0, 1):
        ...     paradigm.join(worker, now=0.0)
        >>> paradigm.push(0, now=1.0)   # waits for worker 1
        []
        >>> paradigm.push(1, now=2.0)   # the round is complete
        [1, 0]
    """

    bound = 0
    averages: ClassVar[bool] = True
