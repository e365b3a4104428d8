"""What is counted about each worker: pushes, leads, staleness and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class WorkerStatistics:
    """Counts of one worker. Leads are those at release; staleness is in updates, times in seconds."""

    rank: int
    pushes: int = 0
    releases: int = 0
    max_lead: int = 0
    total_lead: int = 0
    max_staleness: int = 0
    total_staleness: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0

    def note_push(self, staleness: int, wait_s: float, compute_s: float) -> None:
        """Count a push whose weights were ``staleness`` updates old, and the worker's times since its last message."""
        self.pushes += 1
        self.max_staleness = max(self.max_staleness, staleness)
        self.total_staleness += staleness
        self.note_times(wait_s, compute_s)

    def note_release(self, lead: int) -> None:
        """Count an OK with ``lead``."""
        self.releases += 1
        self.max_lead = max(self.max_lead, lead)
        self.total_lead += lead

    def note_times(self, wait_s: float, compute_s: float) -> None:
        """Add seconds that the worker waited and computed."""
        self.wait_s += wait_s
        self.compute_s += compute_s

    def summary(self) -> dict[str, Any]:
        """Return the row of ``StaleSyncStrategy.summary()``."""
        return {
            "rank": self.rank,
            "pushes": self.pushes,
            "max_lead": self.max_lead,
            "mean_lead": self.total_lead / max(1, self.releases),
            "max_staleness": self.max_staleness,
            "mean_staleness": self.total_staleness / max(1, self.pushes),
            "wait_s": self.wait_s,
            "compute_s": self.compute_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the fields, from which the constructor makes an equal object."""
        return asdict(self)
