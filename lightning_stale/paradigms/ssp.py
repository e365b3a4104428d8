"""Stale synchronous parallel: a bounded lead."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_stale.paradigms.base import ClockGate, check_clock_count


class SSP(ClockGate):
    """Stale synchronous parallel: OK when ``t_p - min(t) <= threshold`` (Ho et al., NIPS 2013).

    Args:
        threshold: the largest lead, in clocks, with which a worker goes on. ``SSP(0)`` meets at every clock like BSP,
            but takes one step per push.

    Raises:
        ValueError: if ``threshold`` is not an integer >= 0.

    Example::

        >>> from lightning_stale import SSP
        >>> paradigm = SSP(threshold=1)
        >>> for worker in (0, 1):
        ...     paradigm.join(worker, now=0.0)
        >>> [paradigm.push(0, now=1.0), paradigm.push(0, now=2.0)]   # the second push is held back
        [[0], []]
        >>> paradigm.push(1, now=3.0)
        [1, 0]
        >>> paradigm.push(0, now=4.0)
        []
        >>> paradigm.set_thresholds(5.0, threshold=2)   # worker 0 need not wait any longer
        [0]
    """

    def __init__(self, threshold: int = 3) -> None:
        super().__init__()
        self.threshold = check_clock_count("SSP", "threshold", threshold)

    @property
    def bound(self) -> int:  # type: ignore[override]
        return self.threshold

    @property
    def thresholds(self) -> dict[str, int]:
        return {"threshold": self.threshold}

    def _change_thresholds(self, now: float, thresholds: Mapping[str, int]) -> list[int]:
        self.threshold = check_clock_count("SSP", "threshold", thresholds["threshold"])
        return self._open_waiting(now)

    def __repr__(self) -> str:
        return f"SSP(threshold={self.threshold})"
