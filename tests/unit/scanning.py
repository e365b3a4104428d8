"""Paradigms and leases that look at all workers at every push: short, and what the fast ones are compared with.

They decide as the package did before its cost per push stopped growing with the number of workers: the least clock is
a ``min`` over all, who waits is a list, and who may be granted a batch is found by asking for everybody in line.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_stale.coordinator.leases import NONE_LEFT, EpochLeases, Grant, Grants, Plan
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm
from lightning_stale.paradigms.adaptive_delay import smallest_delay
from lightning_stale.paradigms.bounded_delay import ENOUGH, KEPT


class ScanningGate:
    bound: float = math.inf

    def __init__(self, bound: float = math.inf) -> None:
        self.bound = bound
        self.clocks: dict[int, int] = {}
        self.waiting: list[int] = []
        self.last_clock = 0

    def join(self, worker: int, now: float) -> None:
        if worker in self.clocks:
            raise ValueError(f"worker {worker} joined twice; it must leave before it joins again")
        self.clocks[worker] = min(self.clocks.values(), default=self.last_clock)

    def push(self, worker: int, now: float) -> list[int]:
        if worker not in self.clocks:
            raise ValueError(f"worker {worker} pushed without having joined; present: {sorted(self.clocks)}")
        if worker in self.waiting:
            raise ValueError(f"worker {worker} pushed while it waits for the OK of its last push")
        self.clocks[worker] += 1
        self.last_clock = max(self.last_clock, self.clocks[worker])
        if self.opens(worker, now):
            return [worker, *self.open_waiting()]
        released = self.open_waiting()
        self.waiting.append(worker)
        return released

    def leave(self, worker: int, now: float) -> list[int]:
        if worker not in self.clocks:
            raise ValueError(f"worker {worker} left without having joined; present: {sorted(self.clocks)}")
        del self.clocks[worker]
        if worker in self.waiting:
            self.waiting.remove(worker)
        return self.open_waiting()

    def set_thresholds(self, now: float, /, **thresholds: int) -> list[int]:
        (self.bound,) = thresholds.values()
        return self.open_waiting()

    def state_dict(self) -> dict[str, Any]:
        return {"clocks": dict(self.clocks), "waiting": list(self.waiting), "last_clock": self.last_clock}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clocks, self.waiting = dict(state["clocks"]), list(state["waiting"])
        self.last_clock = state["last_clock"]

    def lead(self, worker: int) -> int:
        return self.clocks[worker] - min(self.clocks.values())

    def opens(self, worker: int, now: float) -> bool:
        return self.lead(worker) <= self.bound

    def open_waiting(self) -> list[int]:
        released = [worker for worker in self.waiting if self.lead(worker) <= self.bound]
        self.waiting = [worker for worker in self.waiting if worker not in released]
        return released


@dataclass
class Record:
    released_at: float
    pushes: int = 0
    last_push: float = -math.inf
    interval: float = 0.0
    credit: int = 0


class ScanningDSSP(ScanningGate):
    def __init__(self, lower: int, upper: int, enforce_upper: bool) -> None:
        super().__init__(lower)
        self.upper, self.enforce_upper = upper, enforce_upper
        self.records: dict[int, Record] = {}

    def join(self, worker: int, now: float) -> None:
        super().join(worker, now)
        self.records[worker] = Record(released_at=now)

    def push(self, worker: int, now: float) -> list[int]:
        record = self.records.get(worker)
        if record is not None and worker not in self.waiting:
            record.pushes += 1
            record.interval = now - record.released_at
            record.last_push = now
        return self.note_release(super().push(worker, now), now)

    def leave(self, worker: int, now: float) -> list[int]:
        released = self.note_release(super().leave(worker, now), now)
        del self.records[worker]
        return released

    def controller(self, worker: int, now: float) -> int:
        fast = self.records[worker]
        slowest = min(self.clocks, key=lambda p: (self.clocks[p], self.records[p].last_push))
        slow = self.records[slowest]
        if fast.pushes < 2 or slow.pushes < 2:
            return 0
        horizon = range(self.upper - int(self.bound) + 1)
        slow_pushes = [slow.last_push + (k + 1) * slow.interval for k in horizon]

        def wait(i: int) -> float:
            return min(abs(slow_push - (now + i * fast.interval)) for slow_push in slow_pushes)

        return min(horizon, key=wait)

    def set_thresholds(self, now: float, /, **thresholds: int) -> list[int]:
        self.bound, self.upper = thresholds["lower"], thresholds["upper"]
        if self.enforce_upper:
            for worker, record in self.records.items():
                record.credit = min(record.credit, max(0, self.upper - self.lead(worker)))
        return self.note_release(self.open_waiting(), now)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "records": {worker: asdict(record) for worker, record in self.records.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.records = {worker: Record(**record) for worker, record in state["records"].items()}

    def opens(self, worker: int, now: float) -> bool:
        record = self.records[worker]
        if record.credit > 0:
            record.credit -= 1
            return True
        if self.lead(worker) <= self.bound:
            return True
        if self.clocks[worker] < max(self.clocks.values()):
            return False
        grant = self.controller(worker, now)
        if self.enforce_upper:
            grant = min(grant, self.upper - self.lead(worker) + 1)
        if grant <= 0:
            return False
        record.credit = grant - 1 if self.enforce_upper else grant
        return True

    def note_release(self, released: list[int], now: float) -> list[int]:
        for worker in released:
            self.records[worker].released_at = now
        return released


class ScanningAuto(ScanningGate):
    """``BoundedDelay("auto")``, without limits of its own."""

    def __init__(self, waiting: float) -> None:
        super().__init__()
        self.share, self.found, self.commits = waiting, None, 0
        self.begun: dict[int, float] = {}
        self.durations: dict[int, deque[float]] = {}

    @property
    def delay(self) -> int:
        workers = max(1, len(self.clocks))
        return min(max(2 * workers if self.found is None else self.found, workers), 8 * workers)

    def note_grant(self, worker: int, now: float) -> None:
        self.begun[worker] = now

    def note_commit(self, worker: int, now: float) -> None:
        begun = self.begun.pop(worker, None)
        if begun is None:
            return
        self.durations.setdefault(worker, deque(maxlen=KEPT)).append(now - begun)
        self.commits += 1
        workers = max(1, len(self.clocks))
        if self.commits < 4 * workers:
            return
        durations = [self.durations.get(each, ()) for each in sorted(self.clocks)]
        if not durations or any(len(each) < ENOUGH for each in durations):
            return
        self.found = smallest_delay(durations, lower=workers, upper=8 * workers, waiting=self.share, start=self.delay)
        self.commits = 0

    def leave(self, worker: int, now: float) -> list[int]:
        released = super().leave(worker, now)
        self.begun.pop(worker, None)
        return released

    def state_dict(self) -> dict[str, Any]:
        durations = {worker: list(each) for worker, each in self.durations.items()}
        adaptation = {"delay": self.found, "commits": self.commits, "durations": durations}
        return {**super().state_dict(), "adaptation": adaptation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.begun.clear()
        self.found, self.commits = state["adaptation"]["delay"], state["adaptation"]["commits"]
        self.durations = {w: deque(each, maxlen=KEPT) for w, each in state["adaptation"]["durations"].items()}


def scanning(paradigm: Paradigm) -> Any:
    """Return what decides as ``paradigm``, a fresh one, does, by looking at everybody."""
    match paradigm:
        case DSSP():
            return ScanningDSSP(paradigm.lower, paradigm.upper, paradigm.enforce_upper)
        case SSP():
            return ScanningGate(paradigm.threshold)
        case BSP():
            return ScanningGate(0)
        case ASP():
            return ScanningGate()
        case BoundedDelay(auto=True):
            return ScanningAuto(paradigm.waiting)
    raise AssertionError(paradigm)


class ScanningLeases(EpochLeases):
    """The batches of an epoch, with a look at everybody in line and at everything that is kept."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._held: dict[int, tuple[int, int]] = {}  # type: ignore[assignment]
        self._line: list[int] = []  # type: ignore[assignment]

    @property
    def left(self) -> int:
        return self._end - self._fresh + len(self._returned) + sum(map(len, self._kept.values()))

    def open(self, plan: Plan, members: Collection[int]) -> None:
        same = plan == self.plan
        super().open(plan, members)
        self._owed = self._owed if same else set(members)

    def request(self, member: int) -> Grants:
        if member in self._line:
            raise ValueError(f"worker {member} asks for a batch while it waits for one")
        self._line.append(member)
        return self.serve()

    def take_back(self, member: int) -> Grants:
        mine = [*self._kept.pop(member, ()), *(self._held.pop(lease)[1] for lease in self.of(member))]
        self._returned.extendleft(sorted(mine, reverse=True))
        self._line = [waiting for waiting in self._line if waiting != member]
        self._owed.discard(member)
        return self.serve()

    def serve(self) -> Grants:
        grants: Grants = []
        for member in list(self._line):
            grant = self._grant(member)
            if grant is not None:
                self._line.remove(member)
                grants.append((member, grant))
        return grants

    def _grant(self, member: int) -> Grant | None:
        if self.left > 0:
            return super()._grant(member)
        if self._held or self._division is None:
            return None
        end = self._division.plan.batches
        return Grant(NONE_LEFT, end, end, self.step)

    def _take(self, member: int) -> int:
        if self._kept.get(member):
            return self._kept[member].popleft()
        if self._untouched:
            return self._pop()
        return max(self._kept.values(), key=len).pop()

    def _keep(self, member: int, count: int) -> deque[int]:
        kept = self._kept.setdefault(member, deque())
        while len(kept) < count and self._untouched:
            kept.append(self._pop())
        return kept
