"""Asynchronous parallel: nobody ever waits."""

from __future__ import annotations

import math

from lightning_stale.paradigms.base import ClockGate


class ASP(ClockGate):
    """Asynchronous parallel: every push gets its OK at once, whatever the lead.

    Example::

        >>> from lightning_stale import ASP
        >>> paradigm = ASP()
        >>> for worker in (0, 1):
        ...     paradigm.join(worker, now=0.0)
        >>> [paradigm.push(0, now=float(i)) for i in range(3)]
        [[0], [0], [0]]
        >>> paradigm.lead(0)
        3
    """

    bound = math.inf
