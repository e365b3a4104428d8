"""What is counted: pushes, leads, staleness and times of each worker, and leads under each set of thresholds."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass
class Phase:
    """From one change of the thresholds to the next."""

    thresholds: dict[str, int]
    since: int  # the updates before it
    max_lead: int = 0  # at release, so never above the bound in force


class RunStatistics:
    """Counts of all workers.

    Args:
        world_size: the number of workers.
        thresholds: those of the start.
    """

    def __init__(self, world_size: int, thresholds: Mapping[str, int]) -> None:
        self.workers = [WorkerStatistics(rank) for rank in range(world_size)]
        self.phases = [Phase(dict(thresholds), since=0)]

    def note_release(self, rank: int, lead: int) -> None:
        """Count an OK for ``rank`` with ``lead``."""
        self.workers[rank].note_release(lead)
        self.phases[-1].max_lead = max(self.phases[-1].max_lead, lead)

    def note_thresholds(self, thresholds: Mapping[str, int], updates: int) -> None:
        """Begin a new phase after ``updates`` updates, if ``thresholds`` are not those of this one."""
        if thresholds != self.phases[-1].thresholds:
            self.phases.append(Phase(dict(thresholds), since=updates))

    def summary(self) -> dict[str, Any]:
        """Return the phases and workers of ``StaleSyncStrategy.summary()``."""
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "workers": [worker.summary() for worker in self.workers],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all counts as plain numbers, lists and dicts."""
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "workers": [worker.state_dict() for worker in self.workers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of ``state``, of as many workers."""
        self.workers = [WorkerStatistics(**worker) for worker in state["workers"]]
        self.phases = [Phase(**phase) for phase in state["phases"]]
