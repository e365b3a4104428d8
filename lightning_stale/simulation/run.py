"""Moves workers of given step times from event to event, and lets the real coordinator decide."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lightning_stale import events
from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import EpochLeases, Grant, Plan
from lightning_stale.coordinator.messages import (
    Arrive,
    Granted,
    Join,
    Joined,
    Lose,
    Met,
    Prepared,
    Push,
    Released,
    Reply,
    Request,
    RoundOver,
)
from lightning_stale.simulation.averaging import run_averaging
from lightning_stale.simulation.cluster import FREE, Cluster
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.setting import AveragingSetting, Setting
from lightning_stale.simulation.step_times import StepTimes

# What happens to a worker. At equal times, workers come in their order, and each in this one.
ARRIVES = 0  # at the meeting after the epoch
PUSHES = 1  # its gradient is before the server
APPLIES = 2  # the server has taken its gradient
DIES = 3
RETURNS = 4


def run(
    setting: Setting | AveragingSetting,
    times: StepTimes,
    cluster: Cluster = FREE,
    *,
    steps: int | None = None,
    epochs: int = 1,
    seed: int = 0,
    record: Callable[[events.Event], None] | None = None,
) -> Outcome:
    """Simulate a run of ``StaleSyncStrategy``: its coordinator, paradigm and leases are the real ones. Or of HPSGD.

    Every epoch has ``steps`` batches per worker. With shards, each worker trains its own; on demand, whoever is free
    gets the next. At the end of an epoch all meet. Each batch takes as long as the next step of its worker's times.

    A worker that dies loses its batch. On demand the others go on, and another takes its place; with shards the run
    ends, and begins again from the last checkpoint, as with DDP.

    Args:
        setting: paradigm and data, or rounds and data.
        times: of the workers.
        cluster: what an exchange costs.
        steps: of each worker in an epoch; those of ``times`` by default.
        epochs: how many.
        seed: of the deaths.
        record: is told what happens, as the recorder of a real server is; not of HPSGD.

    Raises:
        ValueError: if ``steps`` or ``epochs`` is not above zero.

    Example::

        >>> from lightning_stale.simulation import Setting, StepTimes, run
        >>> times = StepTimes("one slow", ((1.0,), (1.0,), (1.0,), (3.0,)))
        >>> outcome = run(Setting.parse("bounded-delay:12"), times, steps=300)
        >>> round(outcome.efficiency, 2), outcome.max_staleness <= 11 + 3
        (1.0, True)
    """
    steps = times.steps if steps is None else steps
    if steps < 1 or epochs < 1:
        raise ValueError(f"steps={steps}, epochs={epochs}: write at least one of each")
    if isinstance(setting, AveragingSetting):
        return run_averaging(setting, times, cluster, steps, epochs, seed)
    simulated = _Run(setting, times, cluster, steps, epochs, seed, record)
    simulated.go()
    return simulated.outcome()


class _Run:
    def __init__(
        self,
        setting: Setting,
        times: StepTimes,
        cluster: Cluster,
        steps: int,
        epochs: int,
        seed: int,
        record: Callable[[events.Event], None] | None,
    ) -> None:
        self.setting, self.times, self.cluster, self.seed = setting, times, cluster, seed
        self.steps, self.epochs = steps, epochs
        self.on_demand = setting.data == "on-demand"
        self.paradigm = setting.make()
        workers = times.workers
        self.coordinator = Coordinator(
            workers,
            self.paradigm,
            leases=EpochLeases(workers, self.paradigm.allows) if self.on_demand else None,
            on_loss="go on" if self.on_demand else "end",
            record=record or (lambda event: None),
        )
        self.record = record
        self.idle_since = [0.0] * workers  # by its own clock
        self.spent = [(0.0, 0.0)] * workers  # waiting and computing, since its last message
        self.work: list[Iterator[float]] = [itertools.cycle(each) for each in times.of]
        self.events: list[tuple[float, int, int, int]] = []  # time, worker, kind, generation
        self.now = 0.0
        self.epoch = -1
        self.generation = [1] * workers
        self.left = [0] * workers  # of its shard
        self.lease = [-1] * workers  # that it holds
        self.pulled = [0] * workers  # the updates before its weights
        self.version = 0
        self.batches = 0
        self.staleness: Counter[int] = Counter()
        self.computed = 0.0
        self.absent = 0.0
        self.died: dict[int, float] = {}  # when
        self.deaths = 0
        self.over = False
        # until when it is busy, and how long it has been in all
        self.inward, self.updates, self.outward = _Busy(), _Busy(), _Busy()
        self.random = random.Random(seed)

    def go(self) -> None:
        """From the start to the end of the last epoch."""
        workers = range(self.times.workers)
        for worker in workers:
            self.coordinator.handle(Join(worker, process=worker), 0.0)
        if self.on_demand:
            for worker in workers[1:]:
                self._may_die(worker)
        for worker in workers:
            self.hear(self.coordinator.handle(Arrive(worker, 1, "start"), 0.0))
        while not self.over:
            self.now, worker, kind, generation = heapq.heappop(self.events)
            if generation == self.generation[worker]:
                self.happen(worker, kind)

    def happen(self, worker: int, kind: int) -> None:
        if kind == PUSHES:
            taken = self.updates.take(self.inward.take(self.now, self.cluster.server_link_s), self.cluster.update_s)
            if taken > self.now:
                self._later(taken, worker, APPLIES)
            else:
                self.push(worker)
        elif kind == APPLIES:
            self.push(worker)
        elif kind == ARRIVES:
            place = f"the end of epoch {self.epoch}"
            self.hear(self.coordinator.handle(Arrive(worker, self.generation[worker], place), self.now))
        elif kind == DIES:
            self.die(worker)
        else:
            message = Join(worker, process=worker, anew=True, ticket=worker)
            self.hear(self.coordinator.handle(message, self.now))

    # --- what workers do ----------------------------------------------------------------------------------------------

    def push(self, worker: int) -> None:
        self.batches += 1
        stale = self.version - self.pulled[worker]
        self.staleness[stale] += 1
        if self.record is not None:
            self.record(events.Spent(self.now, worker, *self.spent[worker]))
            self.record(events.Pushed(self.now, worker, stale))
        if not self.paradigm.averages:
            self.version += 1
        leases = (self.lease[worker],) if self.on_demand else ()
        message = Push(worker, self.generation[worker], leases, asks=self.on_demand)
        self.hear(self.coordinator.handle(message, self.now))

    def hear(self, replies: Iterable[Reply]) -> None:
        met = False
        for reply in replies:
            match reply:
                case Released() if not self.on_demand:
                    self.go_on(reply.member, None)
                case Released() | Granted():
                    self.go_on(reply.member, reply.grant)
                case RoundOver():
                    self.version += 1
                    self.updates.take(self.now, self.cluster.update_s)
                case Met():
                    met = True
                case Joined():
                    self.come_back(reply.member, reply.generation)
        if met:
            self.next_epoch()

    def go_on(self, worker: int, grant: Grant | None) -> None:
        """It has its OK, and pulls the weights of now; after the step of a round, if that is being done."""
        self.pulled[worker] = self.version
        ready = max(self.now, self.updates.until) if self.paradigm.averages else self.now
        begins = self.outward.take(ready, self.cluster.server_link_s) + self.cluster.one_way_s
        if grant.over if grant is not None else self.left[worker] == 0:
            self._later(begins, worker, ARRIVES)
            return
        if grant is not None:
            self.lease[worker] = grant.lease
        else:
            self.left[worker] -= 1
        seconds = next(self.work[worker])
        self.computed += seconds
        self.spent[worker] = begins - self.idle_since[worker], seconds
        self.idle_since[worker] = begins + seconds
        self._later(begins + seconds + self.cluster.one_way_s, worker, PUSHES)

    def next_epoch(self) -> None:
        self.epoch += 1
        if self.epoch == self.epochs:
            self.over = True
            return
        self.coordinator.handle(Prepared(), self.now)
        here = sorted(self.coordinator.membership.present)
        if not self.on_demand:
            for worker in here:
                self.left[worker] = self.steps
                self.go_on(worker, None)
            return
        plan: Plan | None = Plan(self.epoch, self.steps * self.times.workers, 1, self.steps, self.steps)
        for worker in here:
            self.hear(self.coordinator.handle(Request(worker, self.generation[worker], (), plan), self.now))
            plan = None  # that of all others is the same

    # --- deaths -------------------------------------------------------------------------------------------------------

    def _may_die(self, worker: int) -> None:
        if self.cluster.deaths_per_hour:
            after = self.random.expovariate(self.cluster.deaths_per_hour / 3600)
            self._later(self.now + after, worker, DIES)

    def die(self, worker: int) -> None:
        generation = self.generation[worker]
        self.generation[worker] = -generation  # what it has begun comes to nothing
        self.deaths += 1
        self.died[worker] = self.now
        back = self.now + self.cluster.back_after_s
        if back != float("inf"):
            heapq.heappush(self.events, (back, worker, RETURNS, -generation))
        self.hear(self.coordinator.handle(Lose(worker, generation), self.now))

    def come_back(self, worker: int, generation: int) -> None:
        self.generation[worker] = generation
        self.absent += self.now - self.died.pop(worker)
        self._may_die(worker)
        self.hear(self.coordinator.handle(Request(worker, generation), self.now))

    def _later(self, at: float, worker: int, kind: int) -> None:
        heapq.heappush(self.events, (at, worker, kind, self.generation[worker]))

    # --- the end ------------------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        absent = self.absent + sum(self.now - died for died in self.died.values())
        present = self.now * self.times.workers - absent
        took = self.now
        if not self.on_demand:
            took = self.cluster.with_restarts(self.now, self.times.workers, self.seed)
        return Outcome(
            self.setting.name,
            self.setting.data,
            self.times.workers,
            self.epochs,
            self.batches,
            took,
            computing=self.computed / present,
            efficiency=self.batches / took / self.times.own_rates,
            server_load=max(each.total for each in (self.inward, self.updates, self.outward)) / self.now,
            staleness=self.staleness,
            deaths=self.deaths,
        )


class _Busy:
    """Something of which one can make use at a time, first come, first served."""

    def __init__(self) -> None:
        self.until = self.total = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Return when a use of ``seconds`` that is wanted from ``now`` on is over."""
        if seconds == 0.0 and now >= self.until:
            return now
        self.until = max(now, self.until) + seconds
        self.total += seconds
        return self.until
