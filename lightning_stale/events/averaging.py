"""What is counted of averaging, on one rank: steps, rounds, and how much of the exchange was hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_stale.events.kinds import Event, Exchanged, RoundEnded, Spent, Stepped


@dataclass
class AveragingCounts:
    """Counts of one rank; times in seconds.

    Example::

        >>> from lightning_stale.events import Exchanged, RoundEnded, Stepped
        >>> from lightning_stale.events.averaging import AveragingCounts
        >>> counts = AveragingCounts()
        >>> for event in (Stepped(0.1), Stepped(0.2), Exchanged(0.3, exchange_s=0.2, wait_s=0.05), RoundEnded(0.3)):
        ...     counts.note(event)
        >>> row = counts.summary(rank=0)
        >>> row["steps_per_round"], row["hidden"]
        (2.0, 0.75)
    """

    steps: int = 0
    rounds: int = 0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0

    def note(self, event: Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        match event:
            case Stepped():
                self.steps += 1
            case RoundEnded():
                self.rounds += 1
            case Exchanged():
                self.exchange_s += event.exchange_s
                self.wait_s += event.wait_s
            case Spent():
                self.compute_s += event.compute_s

    def summary(self, rank: int) -> dict[str, Any]:
        """Return the row of ``HPSGDStrategy.summary()``."""
        return {
            "rank": rank,
            "steps": self.steps,
            "rounds": self.rounds,
            "steps_per_round": self.steps / max(1, self.rounds),
            "hidden": 1 - self.wait_s / max(self.exchange_s, 1e-9),
            "wait_s": self.wait_s,
            "compute_s": self.compute_s,
        }
