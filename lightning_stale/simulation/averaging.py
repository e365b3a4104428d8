"""HPSGD over given step times: when rounds end, and who waits for them (the rules of ``averaging/rounds.py``)."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.coordinator.messages import Arrive, Granted, Join, Request
from lightning_stale.coordinator.round_leases import RoundLeases
from lightning_stale.simulation.cluster import Cluster
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.setting import AveragingSetting
from lightning_stale.simulation.step_times import StepTimes

STEPPED, WAITED = 0, 1
"""What happens to a worker: it has taken a step; the sum that it waits for is there."""


def run_averaging(
    setting: AveragingSetting, times: StepTimes, cluster: Cluster, steps: int, epochs: int, seed: int
) -> Outcome:
    """See :func:`~lightning_stale.simulation.run.run`; at the end of an epoch all flush their rounds.

    A sum takes ``cluster.ring_s`` from when the last worker has launched it, and costs no worker's time but that in
    which it waits; a round costs ``cluster.update_s`` of each. A death ends the run, which begins again from the last
    checkpoint.

    Example::

        >>> from lightning_stale.simulation import Cluster, StepTimes, parse_setting, run
        >>> times = StepTimes("two", ((1.0,), (1.0,)))
        >>> for name in ("hpsgd:1", "hpsgd:2"):
        ...     print(name, round(run(parse_setting(name), times, Cluster(all_reduce_s=2.0), steps=100).efficiency, 2))
        hpsgd:1 0.49
        hpsgd:2 0.96
    """
    simulated = _Run(setting, times, cluster.ring_s(times.workers), cluster.update_s)
    for epoch in range(epochs):
        simulated.train(epoch, steps)
    batches = steps * epochs * times.workers
    took = cluster.with_restarts(simulated.now, times.workers, seed)
    return Outcome(
        setting.name,
        setting.data,
        times.workers,
        epochs,
        batches,
        took,
        computing=simulated.computed / (simulated.now * times.workers),
        efficiency=batches / took / times.own_rates,
        staleness=simulated.staleness(),
    )


@dataclass
class _Sum:
    """One all-reduce."""

    launched: int = 0
    flushing: int = 0
    steps: int = 0
    ended: float | None = None  # once it is known when that will be
    waiting: list[int] = field(default_factory=list)
    meanwhile: int = 0  # steps of the round in which it was under way


@dataclass
class _Worker:
    """Where a worker is in its rounds."""

    work: Iterator[float]
    left: int = 0  # of its shard
    over: bool = False  # no batch is left
    steps: int = 0  # of this round
    pause_s: float = 0.0  # before its next step
    sums: int = 0  # that it has launched
    under_way: bool = False  # the last of them
    flushing: bool = False


class _Run:
    def __init__(self, setting: AveragingSetting, times: StepTimes, exchange_s: float, round_s: float) -> None:
        self.setting, self.exchange_s, self.round_s = setting, exchange_s, round_s
        self.workers = [_Worker(itertools.cycle(each)) for each in times.of]
        self.sums: list[_Sum] = []
        self.events: list[tuple[float, int, int]] = []  # time, worker, kind
        self.now = self.computed = 0.0
        self.fresh = 0  # steps of rounds in which no sum was under way
        self.coordinator = Coordinator(times.workers, leases=RoundLeases(times.workers))
        self.grants: dict[int, Grant] = {}
        for worker in range(times.workers):
            self.coordinator.handle(Join(worker, process=worker), 0.0)
        self.meet("start")

    def train(self, epoch: int, steps: int) -> None:
        """An epoch of ``steps`` per worker, and the flush after it."""
        workers = range(len(self.workers))
        plan = Plan(epoch, steps * len(workers), 1, steps, steps)
        for number in workers:
            worker = self.workers[number]
            worker.left, worker.over = steps, False
            if self.setting.data == "on-demand":
                self.grants.pop(number, None)
                self.ask(number, plan if number == 0 else None)  # that of all others is the same
            self.begin(number)
        while self.events:
            self.now, number, kind = heapq.heappop(self.events)
            if kind == STEPPED:
                self.stepped(number)
            else:
                self.waited(number)
        self.meet(f"the end of epoch {epoch}")

    # --- batches ------------------------------------------------------------------------------------------------------

    def meet(self, place: str) -> None:
        for number in range(len(self.workers)):
            self.coordinator.handle(Arrive(number, 1, place), self.now)

    def ask(self, number: int, plan: Plan | None = None) -> None:
        """It has trained the batch that it had, and asks for the next."""
        held = self.grants.pop(number, None)  # committed at once: when its change is averaged decides no grant
        trained = () if held is None else (held.lease,)
        for reply in self.coordinator.handle(Request(number, 1, trained, plan), self.now):
            assert isinstance(reply, Granted)
            self.grants[reply.member] = reply.grant
        self.workers[number].over = self.grants[number].over

    def begin(self, number: int) -> None:
        worker = self.workers[number]
        worker.left -= 1
        seconds = next(worker.work)
        self.computed += seconds
        heapq.heappush(self.events, (self.now + worker.pause_s + seconds, number, STEPPED))
        worker.pause_s = 0.0

    # --- rounds -------------------------------------------------------------------------------------------------------

    def stepped(self, number: int) -> None:
        worker, on_demand = self.workers[number], self.setting.data == "on-demand"
        worker.steps += 1
        if worker.under_way:
            self.sums[worker.sums - 1].meanwhile += 1
        else:
            self.fresh += 1
        if on_demand:
            self.ask(number)
        else:
            worker.over = worker.left == 0
        if on_demand and worker.over:  # others may wait for a sum, and no round begins here
            self.flush(number)
        elif self.round_ends(number):
            self.wait(number)
        else:
            self.go_on(number)

    def round_ends(self, number: int) -> bool:
        """Begin a round if it is time; return whether the worker has to wait for that."""
        worker, interval = self.workers[number], self.setting.interval
        if interval != "auto" and worker.steps < interval:
            return False
        if not worker.under_way:  # round 0
            self.launch(number)
            return False
        if interval != "auto":
            return True
        ended = self.sums[worker.sums - 1].ended
        if ended is not None and ended <= self.now:
            self.launch(number)
        return False

    def waited(self, number: int) -> None:
        """The sum is there that it has waited for."""
        worker = self.workers[number]
        worker.under_way = False
        if not worker.flushing:
            self.launch(number)
            self.go_on(number)
        elif self.sums[worker.sums - 1].flushing == len(self.workers):
            worker.flushing = False
        else:
            self.launch(number)
            self.wait(number)

    def go_on(self, number: int) -> None:
        if self.workers[number].over:
            self.flush(number)
        else:
            self.begin(number)

    def flush(self, number: int) -> None:
        """Go on taking part in sums until all flush."""
        self.workers[number].flushing = True
        if not self.workers[number].under_way:
            self.launch(number)
        self.wait(number)

    def launch(self, number: int) -> None:
        worker = self.workers[number]
        if worker.sums == len(self.sums):
            self.sums.append(_Sum())
        one = self.sums[worker.sums]
        worker.sums += 1
        worker.under_way, worker.pause_s = True, self.round_s
        one.launched += 1
        one.flushing += worker.flushing
        one.steps += worker.steps
        worker.steps = 0
        if one.launched == len(self.workers):
            one.ended = self.now + self.exchange_s
            for waiting in one.waiting:
                heapq.heappush(self.events, (one.ended, waiting, WAITED))

    def wait(self, number: int) -> None:
        one = self.sums[self.workers[number].sums - 1]
        if one.ended is None:
            one.waiting.append(number)
        else:
            heapq.heappush(self.events, (max(self.now, one.ended), number, WAITED))

    def staleness(self) -> Counter[int]:
        """Return how many gradients have been made while so many were under way."""
        found = Counter({0: self.fresh})
        for one in self.sums:
            found[one.steps] += one.meanwhile
        return +found
