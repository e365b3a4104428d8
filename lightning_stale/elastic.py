"""What a run bears: how many workers may be lost, who replaces them, and how long one that is silent is waited for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Elastic:
    """A run that goes on when workers are lost, and that others may join.

    Args:
        min_workers: with fewer than these, the run ends with an error.
        max_restarts: how many replacements each node starts in all for workers of its own that have died.
        patience_s: how many seconds a worker may give no sign of life (stopped, or its host is gone) until it is given
            up; one that merely computes for long does give them.

    Raises:
        ValueError: for an impossible value.

    Example::

        >>> from lightning_stale import Elastic, StaleSyncStrategy
        >>> strategy = StaleSyncStrategy(paradigm="asp", elastic=Elastic(min_workers=2, max_restarts=10))
        >>> strategy.elastic
        Elastic(min_workers=2, max_restarts=10, patience_s=30.0)
    """

    min_workers: int = 1
    max_restarts: int = 3
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("min_workers", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"Elastic({name}={value!r}): write an integer >= {least}")
        seconds = self.patience_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1 <= seconds < math.inf:
            raise ValueError(f"Elastic(patience_s={seconds!r}): write seconds, at least 1, e.g. patience_s=30")
        object.__setattr__(self, "patience_s", float(seconds))


def as_elastic(value: object) -> Elastic | None:
    """Return what ``elastic=value`` stands for; ``None``: a run that ends when a worker is lost.

    Raises:
        TypeError: if it is neither a bool nor an :class:`Elastic`.
    """
    if isinstance(value, Elastic):
        return value
    if isinstance(value, bool):
        return Elastic() if value else None
    raise TypeError(f"elastic={value!r}: write elastic=True, elastic=False or elastic=Elastic(min_workers=...)")
