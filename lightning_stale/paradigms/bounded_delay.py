"""Bounded delay: nobody begins a batch while one that was handed out long before it is still open."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from lightning_stale.paradigms.adaptive_delay import smallest_delay
from lightning_stale.paradigms.base import ClockGate

KEPT = 8
"""The last so many durations of each worker are kept."""

ENOUGH = 2
"""Every worker has had so many leases before the delay adapts."""


class BoundedDelay(ClockGate):
    """Bounded delay: a batch is handed out only while all handed out ``delay`` or more before it are trained.

    For data on demand (Li et al., *Scaling Distributed Machine Learning with the Parameter Server*, OSDI 2014): lease
    ``t`` is granted only when every lease ``<= t - delay`` is committed or taken back. Every push gets its OK at once;
    who waits, waits for a batch. With N workers the staleness of a gradient is at most ``(delay - 1) + (N - 1)``
    updates; ``delay=1`` is sequential. A worker that is ``f`` times slower than the others for good costs nothing once
    ``delay >= 1 + (N - 1) f``.

    ``"auto"`` finds the smallest delay at which waiting costs less than the share ``waiting`` of the workers' time. It
    starts with 2 N. Whenever 4 N leases are committed, it simulates what the last durations of those present lead to.

    N is the number of workers present: those that have joined and not left. So a delay that depends on N follows every
    join and leave at once; while nobody is present, it is that of one worker. What is known of a worker's durations
    stays when it leaves, as all do at every meeting, and counts when it is back.

    Args:
        delay: R, in leases; ``None`` for twice the number of workers, ``"auto"`` to have it found.
        lower: the smallest delay that ``"auto"`` takes; ``None`` for N (or ``upper``, if that is less).
        upper: the largest; ``None`` for 8 N (or ``lower``, if that is more).
        waiting: for ``"auto"``: the share of the workers' time, between 0 and 1.

    Raises:
        ValueError: if a delay is not an integer >= 1, ``lower > upper``, ``waiting`` is not between 0 and 1, or one of
            them is there without ``delay="auto"``.

    Example::

        >>> from lightning_stale import BoundedDelay
        >>> paradigm = BoundedDelay(delay=2)
        >>> paradigm.allows(5, oldest=4), paradigm.allows(6, oldest=4)
        (True, False)
        >>> twice = BoundedDelay()
        >>> for worker in (0, 1, 2):
        ...     twice.join(worker, now=0.0)
        >>> twice.delay
        6
    """

    def __init__(
        self,
        delay: int | Literal["auto"] | None = None,
        *,
        lower: int | None = None,
        upper: int | None = None,
        waiting: float = 0.02,
    ) -> None:
        super().__init__()
        if delay != "auto" and (lower, upper, waiting) != (None, None, 0.02):
            raise ValueError(
                f"BoundedDelay(delay={delay!r}, lower={lower!r}, upper={upper!r}, waiting={waiting!r}): lower, upper "
                "and waiting are for delay='auto': write that, or leave them out"
            )
        self._fixed = None if delay is None or delay == "auto" else _check_delay("delay", delay)
        self.auto = delay == "auto"
        self.lower = None if lower is None else _check_delay("lower", lower)
        self.upper = None if upper is None else _check_delay("upper", upper)
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(
                f"BoundedDelay(delay='auto', lower={lower}, upper={upper}): lower must not exceed upper; did you mean "
                f"lower={upper}, upper={lower}?"
            )
        if isinstance(waiting, bool) or not isinstance(waiting, (int, float)) or not 0 < waiting < 1:
            raise ValueError(
                f"BoundedDelay(waiting={waiting!r}): write the share of the workers' time that waiting may take, "
                "between 0 and 1, e.g. 0.02"
            )
        self.waiting = waiting
        self._found: int | None = None
        self._elsewhere: int | None = None  # in force where the workers are; this one only shows it
        self._begun: dict[int, float] = {}
        self._durations: dict[int, deque[float]] = {}
        self._commits = 0  # since the delay was last looked for
        self._known = 0  # of how many of those present enough is known

    @property
    def delay(self) -> int:
        """R as it is now."""
        if self._fixed is not None:
            return self._fixed
        if not self._clocks and self._elsewhere is not None:
            return self._elsewhere
        delay = 2 * self._workers if self._found is None else self._found
        if not self.auto:
            return delay
        lower, upper = self._limits
        return min(max(delay, lower), upper)

    def allows(self, lease: int, oldest: int) -> bool:
        """Whether ``lease - oldest < delay``; see :meth:`Paradigm.allows`."""
        return lease - oldest < self.delay

    def note_grant(self, worker: int, now: float) -> None:
        if self.auto:
            self._begun[worker] = now

    def note_commit(self, worker: int, now: float) -> None:
        """Note how long the lease took; now and then this changes :attr:`delay`, so that more may be granted."""
        begun = self._begun.pop(worker, None)
        if begun is None:
            return
        durations = self._durations.setdefault(worker, deque(maxlen=KEPT))
        durations.append(now - begun)
        self._known += worker in self._clocks and len(durations) == ENOUGH
        self._commits += 1
        if self._commits >= 4 * self._workers:
            self._adapt()

    def join(self, worker: int, now: float) -> None:
        super().join(worker, now)
        self._known += self._knows(worker)

    def leave(self, worker: int, now: float) -> list[int]:
        released = super().leave(worker, now)
        self._known -= self._knows(worker)
        self._begun.pop(worker, None)
        return released

    @property
    def thresholds(self) -> dict[str, int]:
        return {"delay": self.delay}

    @property
    def adapts(self) -> bool:
        return self._fixed is None

    def follow_thresholds(self, thresholds: Mapping[str, int]) -> None:
        if self.adapts:
            self._elsewhere = thresholds["delay"]
        else:
            super().follow_thresholds(thresholds)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Paradigm.state_dict`; with ``"auto"``, the delay found is a part of it, and so are durations.

        When open leases were begun is none: their workers begin anew, by another clock.
        """
        state = super().state_dict()
        if not self.auto:
            return state
        durations = {worker: list(each) for worker, each in self._durations.items()}
        return {**state, "adaptation": {"delay": self._found, "commits": self._commits, "durations": durations}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        adaptation = state.get("adaptation")  # there is none where another delay was in force
        self._begun.clear()
        if self.auto and adaptation is not None:
            self._found, self._commits = adaptation["delay"], adaptation["commits"]
            self._durations = {int(w): deque(each, maxlen=KEPT) for w, each in adaptation["durations"].items()}
        self._known = sum(map(self._knows, self._clocks))

    def _change_thresholds(self, now: float, thresholds: Mapping[str, int]) -> list[int]:
        """From now on the delay is this one; nothing adapts it any more."""
        self._fixed = _check_delay("delay", thresholds["delay"])
        self.auto, self.lower, self.upper, self.waiting = False, None, None, 0.02
        self._found = None
        self._begun.clear()
        self._durations.clear()
        self._commits = self._known = 0
        return []

    @property
    def _workers(self) -> int:
        return max(1, len(self._clocks))

    @property
    def _limits(self) -> tuple[int, int]:
        lower = self._workers if self.lower is None else self.lower
        upper = 8 * self._workers if self.upper is None else self.upper
        return (min(lower, upper), upper) if self.lower is None else (lower, max(lower, upper))

    def _knows(self, worker: int) -> bool:
        return len(self._durations.get(worker, ())) >= ENOUGH

    def _adapt(self) -> None:
        """Look for the delay, once there is something known of everybody present."""
        if not self._clocks or self._known < len(self._clocks):
            return
        durations = [self._durations[worker] for worker in sorted(self._clocks)]
        lower, upper = self._limits
        self._found = smallest_delay(durations, lower=lower, upper=upper, waiting=self.waiting, start=self.delay)
        self._commits = 0

    def __repr__(self) -> str:
        if not self.auto:
            return f"BoundedDelay(delay={self._fixed})"
        return f"BoundedDelay(delay='auto', lower={self.lower}, upper={self.upper}, waiting={self.waiting})"


def _check_delay(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        others, auto = (", 'auto', or None for twice the workers", "") if name == "delay" else ("", "delay='auto', ")
        raise ValueError(
            f"BoundedDelay({auto}{name}={value!r}): {name} counts leases and must be an integer >= 1{others}; "
            f"e.g. BoundedDelay({auto}{name}=8)"
        )
    return value
