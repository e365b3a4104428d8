"""An independent reference for the paradigms: a table of all events, from which every decision is read anew.

``Table`` keeps no clocks, queues or credits. At each event it appends a row and works out from the whole history, in
exact fractions, what the rules of ``design/algorithms.md`` (section 1) say. ``play`` runs raw random events against
anything that behaves like a paradigm, and ``simulate`` runs workers with given periods.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from lightning_stale.paradigms import Paradigm

Event = tuple[str, int, float]
"""("join" | "push" | "leave", worker, time)"""


@dataclass
class Row:
    event: str
    worker: int
    time: Fraction
    released: tuple[int, ...] = ()
    covers: int = 0  # DSSP: how many further pushes of this worker the grant made in this row lets through


@dataclass
class Table:
    """The rules of one paradigm over a growing table of events."""

    bound: float  # the lead up to which every worker goes on
    upper: int | None = None  # DSSP only
    enforce_upper: bool = True
    rows: list[Row] = field(default_factory=list)

    def happen(self, event: str, worker: int, time: float) -> list[int]:
        """Add an event, and return who is released by it."""
        row = Row(event, worker, Fraction(time))
        self.rows.append(row)
        clocks = self.clocks()
        open_now = {p for p in self.waiting() if clocks[p] - min(clocks.values()) <= self.bound}
        if event == "push" and self.upper is not None and (self._has_credit() or worker in open_now or self._grants()):
            open_now.add(worker)
        row.released = tuple(sorted(open_now, key=lambda p: (event != "push" or p != worker, self._last("push", p))))
        return list(row.released)

    def clocks(self) -> dict[int, int]:
        clocks: dict[int, int] = {}
        largest = 0
        for row in self.rows:
            if row.event == "leave":
                clocks.pop(row.worker)
            elif row.event == "join":
                clocks[row.worker] = min(clocks.values()) if clocks else largest
            else:
                clocks[row.worker] += 1
                largest = max(largest, *clocks.values())
        return clocks

    def waiting(self) -> set[int]:
        """Present workers whose last push came after whatever last let them go on."""
        return {p for p in self.clocks() if self._last("push", p) > max(self._last("join", p), self._last_release(p))}

    def _last(self, event: str, worker: int) -> int:
        return max((i for i, row in enumerate(self.rows) if (row.event, row.worker) == (event, worker)), default=-1)

    def _last_release(self, worker: int) -> int:
        return max((i for i, row in enumerate(self.rows) if worker in row.released), default=-1)

    def _pushes(self, worker: int) -> list[int]:
        """The rows of its pushes since it joined."""
        joined = self._last("join", worker)
        return [i for i, row in enumerate(self.rows) if i > joined and (row.event, row.worker) == ("push", worker)]

    def _has_credit(self) -> bool:
        """Whether an earlier grant covers the push in the last row."""
        pushes = self._pushes(self.rows[-1].worker)
        return any(len(pushes) - 1 - nth <= self.rows[i].covers for nth, i in enumerate(pushes[:-1]))

    def _grants(self) -> bool:
        """Whether the controller lets the push in the last row through; notes what it grants."""
        row, clocks = self.rows[-1], self.clocks()
        if clocks[row.worker] != max(clocks.values()):
            return False
        assert self.upper is not None
        grant = self.controller(row.worker, row.time)
        if self.enforce_upper:
            row.covers = min(grant, self.upper - (clocks[row.worker] - min(clocks.values())) + 1) - 1
            return row.covers >= 0
        row.covers = grant
        return grant > 0

    def controller(self, fast: int, now: Fraction) -> int:
        clocks = self.clocks()
        slow = min(
            (p for p in clocks if clocks[p] == min(clocks.values())),
            key=lambda p: (self._last_push_time(p), self._last("join", p)),
        )
        if len(self._pushes(fast)) < 2 or len(self._pushes(slow)) < 2:
            return 0
        assert self.upper is not None
        return best_grant(
            self.upper - int(self.bound),
            now,
            self._interval(fast),
            Fraction(self._last_push_time(slow)),
            self._interval(slow),
        )

    def _last_push_time(self, worker: int) -> Fraction | float:
        pushes = self._pushes(worker)
        return self.rows[pushes[-1]].time if pushes else -math.inf

    def _interval(self, worker: int) -> Fraction:
        """From the OK (or the join) before its last push to that push."""
        push = self._pushes(worker)[-1]
        start = max(
            i
            for i, row in enumerate(self.rows[:push])
            if worker in row.released or (row.event, row.worker) == ("join", worker)
        )
        return self.rows[push].time - self.rows[start].time


def best_grant(r_max: int, now: Fraction, fast: Fraction, last_push_slow: Fraction, slow: Fraction) -> int:
    """Algorithm 2 by brute force: the i of the closest pair of predicted pushes, the smallest i on ties."""
    pairs = [
        (abs(last_push_slow + (k + 1) * slow - (now + i * fast)), i) for k in range(r_max + 1) for i in range(r_max + 1)
    ]
    return min(pairs)[1]


def apply_event(paradigm: Paradigm, event: Event) -> list[int]:
    """Let ``event`` happen to ``paradigm``; return who is released."""
    name, worker, now = event
    if name == "join":
        paradigm.join(worker, now)
        return []
    return (paradigm.push if name == "push" else paradigm.leave)(worker, now)


RawEvent = tuple[int, bool, float]
"""(worker, whether it leaves rather than pushes, time since the event before)"""


def play(raw: Iterable[RawEvent], happen: Callable[[Event], list[int]]) -> list[tuple[Event, list[int]]]:
    """Make possible events of raw ones: who is absent joins, who waits may only leave. Returns events with releases."""
    present: set[int] = set()
    waiting: set[int] = set()
    trace, now = [], 0.0
    for worker, leaves, pause in raw:
        now += pause
        if worker not in present:
            name = "join"
            present.add(worker)
        elif leaves:
            name = "leave"
            present.discard(worker)
            waiting.discard(worker)
        elif worker in waiting:
            continue
        else:
            name = "push"
            waiting.add(worker)
        released = happen((name, worker, now))
        waiting.difference_update(released)
        trace.append(((name, worker, now), released))
    return trace


@dataclass
class Run:
    """What ``simulate`` saw."""

    events: list[Event] = field(default_factory=list)
    pushes: dict[int, int] = field(default_factory=dict)
    leads: list[int] = field(default_factory=list)  # at release
    largest_wait: float = 0.0

    @property
    def updates(self) -> int:
        return sum(self.pushes.values())


def simulate(
    paradigm: Paradigm, periods: Mapping[int, float], seconds: float, jitter: float = 0.0, seed: int = 0
) -> Run:
    """Run workers that need ``periods[worker] * (1 +- jitter)`` seconds from each OK to the next push."""
    generator, run = random.Random(seed), Run(pushes=dict.fromkeys(periods, 0))

    def duration(worker: int) -> float:
        return periods[worker] * (generator.uniform(1 - jitter, 1 + jitter) if jitter else 1)

    queue: list[tuple[float, int]] = []
    since: dict[int, float] = {}
    for worker in periods:
        paradigm.join(worker, 0.0)
        run.events.append(("join", worker, 0.0))
        heapq.heappush(queue, (duration(worker), worker))
    while queue and queue[0][0] <= seconds:
        now, worker = heapq.heappop(queue)
        run.pushes[worker] += 1
        run.events.append(("push", worker, now))
        since[worker] = now
        for released in paradigm.push(worker, now):
            run.leads.append(paradigm.lead(released))
            run.largest_wait = max(run.largest_wait, now - since[released])
            heapq.heappush(queue, (now + duration(released), released))
    return run
