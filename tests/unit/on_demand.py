"""Two simulations of data on demand that have nothing in common, and step times of real jobs to run them on.

``drive`` moves workers from event to event, and asks ``EpochLeases`` and the paradigm for every batch. ``formula``
works out the times of one lease after another from section 4 of ``design/algorithms.md``, and knows neither of them.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_stale.coordinator.leases import EpochLeases, Grants, Plan
from lightning_stale.paradigms import BoundedDelay, Paradigm

Durations = Sequence[Sequence[float]]
"""Of each worker: how long its batches take, in seconds; after the last, the first comes again."""


@dataclass
class Lease:
    worker: int
    begin: float
    waited: float  # for this grant
    end: float = 0.0
    staleness: int = 0  # the updates while it was open


@dataclass
class Run:
    """What a simulation saw: the leases that were committed, in the order of granting."""

    leases: dict[int, Lease] = field(default_factory=dict)
    trained: list[tuple[int, int]] = field(default_factory=list)  # the batches of each commit
    delays: list[int] = field(default_factory=list)  # at each commit, bounded delay only
    open_at_once: int = 0
    over: set[int] = field(default_factory=set)  # who was told that no batch is left

    @property
    def makespan(self) -> float:
        return max(lease.end for lease in self.leases.values())

    @property
    def staleness(self) -> list[int]:
        return [self.leases[number].staleness for number in sorted(self.leases)]

    @property
    def waiting_share(self) -> float:
        waited = sum(lease.waited for lease in self.leases.values())
        return waited / (waited + sum(lease.end - lease.begin for lease in self.leases.values()))


class _Events:
    """Workers that ask, are granted batches, push them, and may be lost and come back."""

    def __init__(self, paradigm: Paradigm, durations: Durations, batches: int) -> None:
        workers = len(durations)
        self.paradigm, self.run, self.now = paradigm, Run(), 0.0
        self.leases = EpochLeases(workers, paradigm.allows)
        steps = batches // workers
        self.leases.open(Plan(epoch=0, batches=batches, each=1, steps=steps, until=steps), range(workers))
        self.work: list[Iterator[float]] = [itertools.cycle(each) for each in durations]
        self.queue: list[tuple[float, int, int]] = []  # time, worker, lease
        self.open: dict[int, tuple[Lease, tuple[int, int], int]] = {}  # with its batches, and the updates before it
        self.free_since: dict[int, float] = {}
        self.updates = 0

    def join(self, worker: int) -> None:
        self.paradigm.join(worker, self.now)
        self.ask(worker)

    def ask(self, worker: int) -> None:
        self.free_since[worker] = self.now
        self.begin(self.leases.request(worker))

    def begin(self, grants: Grants) -> None:
        for worker, grant in grants:
            since = self.free_since.pop(worker)
            if grant.over:
                self.run.over.add(worker)
                continue
            self.paradigm.note_grant(worker, self.now)
            lease = Lease(worker, self.now, self.now - since)
            self.open[grant.lease] = lease, (grant.first, grant.last), self.updates
            heapq.heappush(self.queue, (self.now + next(self.work[worker]), worker, grant.lease))
        self.run.open_at_once = max(self.run.open_at_once, len(self.open))

    def lose(self, worker: int) -> None:
        self.open = {number: entry for number, entry in self.open.items() if entry[0].worker != worker}
        self.free_since.pop(worker, None)
        self.paradigm.leave(worker, self.now)
        self.begin(self.leases.take_back(worker))

    def push(self, worker: int, number: int) -> None:
        assert self.leases.stale(worker, [number]) is None
        lease, batches, before = self.open.pop(number)
        lease.end, lease.staleness = self.now, self.updates - before
        self.updates += 1
        self.run.leases[number] = lease
        self.run.trained.append(batches)
        self.paradigm.note_commit(worker, self.now)
        assert self.paradigm.push(worker, self.now) == [worker]
        if isinstance(self.paradigm, BoundedDelay):
            self.run.delays.append(self.paradigm.delay)
        self.begin(self.leases.commit(worker, [number]))


def drive(
    paradigm: Paradigm,
    durations: Durations,
    batches: int,
    *,
    lost: Mapping[int, int] = {},  # read only
    back: Mapping[int, int] = {},  # likewise
    changes: Mapping[int, int] = {},  # likewise
) -> Run:
    """Let ``EpochLeases`` and ``paradigm`` hand out batches to workers until none is left.

    Args:
        paradigm: a fresh one.
        durations: of each worker.
        batches: how many there are.
        lost: who is gone after how many updates.
        back: who is back then.
        changes: the delays that are set after how many updates.
    """
    events = _Events(paradigm, durations, batches)
    for worker in range(len(durations)):
        paradigm.join(worker, 0.0)
    for worker in range(len(durations)):
        events.ask(worker)
    while events.queue:
        events.now, worker, number = heapq.heappop(events.queue)
        if number not in events.open:
            continue  # it was lost with its worker
        events.push(worker, number)
        events.ask(worker)
        gone, returning = lost.get(events.updates), back.get(events.updates)
        if gone in paradigm.clocks and len(paradigm.clocks) > 1:
            events.lose(gone)
        if returning is not None and returning < len(durations) and returning not in paradigm.clocks:
            events.join(returning)
        if events.updates in changes:
            assert paradigm.set_thresholds(events.now, delay=changes[events.updates]) == []
            events.begin(events.leases.serve())
    return events.run


def formula(durations: Durations, batches: int, delay: float) -> Run:
    """Work out every lease from those before it.

    Lease ``t`` is had by who is free first, at ``F``. It begins at ``max(F, C_s for all s <= t - delay)``, where
    ``C_s`` is the end of lease ``s``; its staleness is the number of leases that end between its begin and its end.
    """
    work = [itertools.cycle(each) for each in durations]
    free = [0.0] * len(durations)
    leases: list[Lease] = []
    all_ended: list[float] = []  # when all leases up to this one have
    for number in range(batches):
        worker = free.index(min(free))
        must_have_ended = all_ended[number - int(delay)] if delay <= number else 0.0
        begin = max(free[worker], must_have_ended)
        lease = Lease(worker, begin, begin - free[worker], begin + next(work[worker]))
        free[worker] = lease.end
        leases.append(lease)
        all_ended.append(max([lease.end, *all_ended[-1:]]))
    ends = sorted(lease.end for lease in leases)
    for lease in leases:
        lease.staleness = max(0, bisect.bisect_left(ends, lease.end) - bisect.bisect_right(ends, lease.begin))
    return Run(dict(enumerate(leases)))


def step_times(job: str) -> list[list[float]]:
    """Return the step times of each worker of a real job, ``"SE"`` or ``"AR"``."""
    path = Path(__file__).parent / "data" / "step_times.csv"
    rows = [line.split(",") for line in path.read_text().splitlines() if line.startswith(f"{job},")]
    return [[float(value) for value in row[2:]] for row in rows]
