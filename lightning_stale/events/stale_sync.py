"""What is counted of bounded staleness: pushes, leads, staleness and times, per worker and per set of thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_stale.events.histogram import count
from lightning_stale.events.kinds import (
    Event,
    Granted,
    Joined,
    Left,
    Pushed,
    Refused,
    Released,
    Spent,
    TakenBack,
    ThresholdsSet,
    Updated,
)


@dataclass
class WorkerCounts:
    """Counts of one worker. Leads are those at release; staleness is in updates, times in seconds.

    ``leads`` and ``staleness`` say how often each came (:mod:`~lightning_stale.events.histogram`), ``leases`` how many
    batches were handed out to it, and ``taken_back`` how many of those went to others.
    """

    rank: int
    pushes: int = 0
    releases: int = 0
    max_lead: int = 0
    total_lead: int = 0
    max_staleness: int = 0
    total_staleness: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    refused: int = 0
    leases: int = 0
    taken_back: int = 0
    leads: dict[int, int] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leads, self.staleness = dict(self.leads), dict(self.staleness)  # not those of a checkpoint

    def summary(self) -> dict[str, Any]:
        """Return the row of ``StaleSyncStrategy.summary()``."""
        return {
            "rank": self.rank,
            "pushes": self.pushes,
            "refused": self.refused,
            "max_lead": self.max_lead,
            "mean_lead": self.total_lead / max(1, self.releases),
            "max_staleness": self.max_staleness,
            "mean_staleness": self.total_staleness / max(1, self.pushes),
            "wait_s": self.wait_s,
            "compute_s": self.compute_s,
            "leases": self.leases,
            "taken_back": self.taken_back,
            "leads": dict(sorted(self.leads.items())),
            "staleness": dict(sorted(self.staleness.items())),
        }


@dataclass
class Phase:
    """From one change of the thresholds to the next."""

    thresholds: dict[str, int]
    since: int  # the updates before it
    max_lead: int = 0  # at release, so never above the bound in force


class StaleSyncCounts:
    """Counts what the recorder of a parameter server tells it.

    Args:
        world_size: the number of workers.
        thresholds: those of the start.

    Example::

        >>> from lightning_stale.events import Pushed, Released, Updated
        >>> from lightning_stale.events.stale_sync import StaleSyncCounts
        >>> counts = StaleSyncCounts(world_size=2, thresholds={"threshold": 3})
        >>> for event in (Pushed(0.1, worker=1, staleness=2), Updated(0.1, updates=1), Released(0.1, worker=1, lead=1)):
        ...     counts.note(event)
        >>> counts.summary()["updates"], counts.summary()["workers"][1]["max_staleness"]
        (1, 2)
    """

    def __init__(self, world_size: int, thresholds: Mapping[str, int]) -> None:
        self.updates = 0
        self.workers = [WorkerCounts(rank) for rank in range(world_size)]
        self.phases = [Phase(dict(thresholds), since=0)]
        self.changes = {"joins": 0, "leaves": 0, "taken_back": 0}
        self._awaited = set(range(world_size))  # of these, who has not been here yet

    def note(self, event: Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        match event:
            case Pushed():
                worker = self._of(event.worker)
                worker.pushes += 1
                worker.max_staleness = max(worker.max_staleness, event.staleness)
                worker.total_staleness += event.staleness
                count(worker.staleness, event.staleness)
            case Refused():
                self._of(event.worker).refused += 1
            case Released():
                worker = self._of(event.worker)
                worker.releases += 1
                worker.max_lead = max(worker.max_lead, event.lead)
                worker.total_lead += event.lead
                count(worker.leads, event.lead)
                self.phases[-1].max_lead = max(self.phases[-1].max_lead, event.lead)
            case Spent():
                self._of(event.worker).wait_s += event.wait_s
                self._of(event.worker).compute_s += event.compute_s
            case Updated():
                self.updates = event.updates
            case ThresholdsSet():
                self._begin_phase(event.thresholds)
            case Joined() if event.worker in self._awaited:
                self._awaited.remove(event.worker)
            case Joined():
                self.changes["joins"] += 1
            case Left() if event.lost:
                self.changes["leaves"] += 1
            case Granted():
                self._of(event.worker).leases += 1
            case TakenBack():
                self.changes["taken_back"] += 1
                self._of(event.worker).taken_back += 1

    def _of(self, rank: int) -> WorkerCounts:
        while len(self.workers) <= rank:  # it has come while the run went on
            self.workers.append(WorkerCounts(len(self.workers)))
        return self.workers[rank]

    def _begin_phase(self, thresholds: Mapping[str, int]) -> None:
        last = self.phases[-1]
        if thresholds != last.thresholds:
            if self.updates == 0 and last.max_lead == 0:  # nothing has happened under these
                self.phases.pop()
            self.phases.append(Phase(dict(thresholds), since=self.updates))

    def summary(self) -> dict[str, Any]:
        """Return what ``StaleSyncStrategy.summary()`` does, but for the paradigm."""
        return {
            "updates": self.updates,
            **self.changes,
            "phases": [asdict(phase) for phase in self.phases],
            "workers": [worker.summary() for worker in self.workers],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all counts as plain numbers, lists and dicts."""
        return {
            "updates": self.updates,
            "changes": dict(self.changes),
            "phases": [asdict(phase) for phase in self.phases],
            "workers": [asdict(worker) for worker in self.workers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; from its updates only if that is of another number of workers."""
        thresholds = self.phases[-1].thresholds
        self.updates = state["updates"]
        self.changes |= state.get("changes", {})  # not in a checkpoint of 0.1
        if len(state["workers"]) == len(self.workers):
            self.workers = [WorkerCounts(**worker) for worker in state["workers"]]
            self.phases = [Phase(**phase) for phase in state["phases"]]
        self._begin_phase(thresholds)
