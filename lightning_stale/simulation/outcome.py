"""What came out of a simulated run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """The figures of one setting; times in simulated seconds.

    Args:
        name: of the setting, or ``"ddp"``.
        data: ``"shards"`` or ``"on-demand"``.
        workers: how many the run was started with.
        epochs: how many were run.
        batches: trained in all of them.
        seconds: all of them took.
        computing: share of the time of the workers present in which they computed. The rest is what a worker of the
            real strategy counts as waiting: from its push to its OK, the exchange included.
        efficiency: batches per second, over the sum of the rates that the workers have alone.
        server_load: share of the time in which the server's updates, or a direction of its link, were busy: the
            busiest of the three; ``None`` where there is no server.
        staleness: how many gradients were so many updates stale, the updates between their pull and their push. Of
            HPSGD, whose weights change once a round: the gradients of the round that was under way.
        deaths: of workers.
    """

    name: str
    data: str
    workers: int
    epochs: int
    batches: int
    seconds: float
    computing: float
    efficiency: float
    server_load: float | None = None
    staleness: Counter[int] = field(default_factory=Counter)
    deaths: int = 0

    @property
    def epoch_s(self) -> float:
        """The mean time of an epoch."""
        return self.seconds / self.epochs

    @property
    def rate(self) -> float:
        """Batches per second."""
        return self.batches / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the workers' time in which they did not compute."""
        return 1 - self.computing

    @property
    def mean_staleness(self) -> float:
        """Of a gradient, in updates."""
        return sum(value * count for value, count in self.staleness.items()) / max(1, self.staleness.total())

    @property
    def max_staleness(self) -> int:
        """The largest of a gradient."""
        return max(self.staleness, default=0)

    def quantile(self, share: float) -> int:
        """Return the smallest staleness that this share of the gradients does not exceed.

        Example::

            >>> from collections import Counter
            >>> from lightning_stale.simulation import Outcome
            >>> outcome = Outcome("asp", "shards", 2, 1, 100, 1.0, 1.0, 1.0, staleness=Counter({0: 98, 1: 1, 7: 1}))
            >>> outcome.quantile(0.99), outcome.max_staleness
            (1, 7)
        """
        seen = 0
        for value in sorted(self.staleness):
            seen += self.staleness[value]
            if seen >= share * self.staleness.total():
                return value
        return 0

    def row(self) -> dict[str, Any]:
        """Return all figures as plain numbers, for JSON."""
        return {
            "setting": self.name,
            "data": self.data,
            "epoch_s": self.epoch_s,
            "batches_per_s": self.rate,
            "efficiency": self.efficiency,
            "waiting": self.waiting,
            "staleness": {"mean": self.mean_staleness, "p99": self.quantile(0.99), "max": self.max_staleness},
            "server_load": self.server_load,
            "deaths": self.deaths,
        }
