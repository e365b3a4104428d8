"""A pipeline simulated in another way: processes and semaphores in virtual time, as ``channels/process.py`` has them.

Nothing of it is shared with the package: the order of a stage's work is written down once more, from section 3 of
``design/algorithms.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

Process = Iterator[float | Callable[[], bool]]
"""Yields seconds to sleep, or a condition to wait for."""


class World:
    """Lets processes run until all that end have ended."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asleep: list[tuple[float, Process]] = []
        self.waiting: list[tuple[Callable[[], bool], Process]] = []

    def start(self, process: Process) -> None:
        for want in process:
            if callable(want):
                if not want():
                    self.waiting.append((want, process))
                    return
            elif want > 0:
                self.asleep.append((self.now + want, process))
                return

    def run(self) -> None:
        while True:
            able = next((one for one in self.waiting if one[0]()), None)
            if able is not None:
                self.waiting.remove(able)
                self.start(able[1])
            elif self.asleep:
                first = min(self.asleep, key=lambda one: one[0])
                self.asleep.remove(first)
                self.now = first[0]
                self.start(first[1])
            else:
                return


class Queue:
    """A thread that sends, one that receives, the semaphore of the latter, and the count of the former."""

    def __init__(self, world: World, length: float, message_s: float) -> None:
        self.length, self.message_s = length, message_s
        self.outbox = self.unsent = self.inbox = 0
        self.room = length
        world.start(self._move())

    def _move(self) -> Process:
        while True:
            yield lambda: self.outbox > 0 and self.room > 0
            self.outbox -= 1
            self.room -= 1
            yield self.message_s
            self.unsent -= 1
            self.inbox += 1

    def send(self) -> Process:
        self.outbox += 1
        self.unsent += 1
        yield lambda: self.unsent <= self.length

    def receive(self) -> Process:
        self.room += 1
        yield lambda: self.inbox > 0
        self.inbox -= 1


def simulate(
    works: Sequence[Sequence[tuple[str, float]]], p: Sequence[float], q: Sequence[float], message_s: float
) -> tuple[list[float], list[dict[str, float]]]:
    """Run stages that each do ``works`` (forward, backward or update, with seconds); return ends, and waiting times."""
    world, stages = World(), len(works)
    down = [Queue(world, p[k], message_s) for k in range(stages - 1)]
    up = [Queue(world, q[k + 1], message_s) for k in range(stages - 1)]
    ends = [math.nan] * stages
    waits = [{"features": 0.0, "gradients": 0.0, "sending": 0.0} for _ in range(stages)]

    def stage(k: int) -> Process:
        for kind, seconds in works[k]:
            forward, backward = kind == "forward", kind == "backward"
            source = down[k - 1] if forward and k > 0 else up[k] if backward and k < stages - 1 else None
            target = down[k] if forward and k < stages - 1 else up[k - 1] if backward and k > 0 else None
            since = world.now
            if source is not None:
                yield from source.receive()
                waits[k]["features" if forward else "gradients"] += world.now - since
            yield seconds
            since = world.now
            if target is not None:
                yield from target.send()
                waits[k]["sending"] += world.now - since
        ends[k] = world.now

    for k in range(stages):
        world.start(stage(k))
    world.run()
    return ends, waits


def dsp_works(
    m: int, forward: Sequence[float], backward: Sequence[float], batches: int, recompute: bool
) -> list[tuple[str, float]]:
    """Return what a stage of DSP with staleness ``m`` does."""
    works = []
    for n in range(batches + m):
        if n < batches:
            works.append(("forward", forward[n % len(forward)]))
        j = n - m
        if 0 <= j < batches:
            again = forward[j % len(forward)] if recompute and m > 0 else 0.0
            works.append(("backward", backward[j % len(backward)] + again))
    return works
