"""Moves stages through what each has to do, one after the other; they wait for each other's messages only.

Who computes is decided by nobody: each stage does its own in a fixed order, so that every time follows from earlier
ones, and it does not matter which stage is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_stale.simulation.pipeline.channel import TimedChannel

Direction = Literal["features", "gradients"]
MessageTime = Callable[[Direction, int, int], float]
"""(direction, stage that sends, number of the message) -> seconds on its way."""


class Work(NamedTuple):
    """What a stage does next, and for how many seconds: a forward or backward with its messages, or anything else."""

    kind: Literal["forward", "backward", "update"]
    seconds: float


@dataclass
class StageRun:
    """What a stage did with its time, in seconds, until it had ended."""

    busy_s: float = 0.0
    features_s: float = 0.0
    """It waited for features."""
    gradients_s: float = 0.0
    """For gradients."""
    sending_s: float = 0.0
    """For room in the queue that it sends into."""
    ended: float = 0.0


def run_stages(
    works: Sequence[Iterable[Work]], features: Sequence[float], gradients: Sequence[float], message_s: MessageTime
) -> list[StageRun]:
    """Let every stage do its work.

    Args:
        works: for each stage, in order.
        features: the lengths of the queues from stage ``k`` to ``k + 1``.
        gradients: those from stage ``k`` to ``k - 1``; the first is not used.
        message_s: how long a message takes.

    Raises:
        ValueError: if stages wait for each other for ever.
    """
    stages = len(works)

    def channel(direction: Direction, sender: int, length: float) -> TimedChannel:
        return TimedChannel(length, lambda number: message_s(direction, sender, number))

    down = [channel("features", k, features[k]) for k in range(stages - 1)]
    up = [channel("gradients", k + 1, gradients[k + 1]) for k in range(stages - 1)]
    runs = [StageRun() for _ in works]
    moving = [
        _Stage(
            runs[k],
            down[k - 1] if k > 0 else None,
            down[k] if k < stages - 1 else None,
            up[k] if k < stages - 1 else None,
            up[k - 1] if k > 0 else None,
        ).go(work)
        for k, work in enumerate(works)
    ]
    left = dict(enumerate(moving))
    while left:
        moved = False
        for k, stage in list(left.items()):
            state = next(stage, None)
            if state is None:
                del left[k]
            moved = moved or state is not False
        if not moved:
            raise ValueError(f"stages {sorted(left)} wait for each other for ever")
    return runs


class _Stage:
    def __init__(
        self,
        run: StageRun,
        features_in: TimedChannel | None,
        features_out: TimedChannel | None,
        gradients_in: TimedChannel | None,
        gradients_out: TimedChannel | None,
    ) -> None:
        self.run = run
        self.features_in, self.features_out = features_in, features_out
        self.gradients_in, self.gradients_out = gradients_in, gradients_out

    def go(self, works: Iterable[Work]) -> Iterator[bool]:
        """Yield whenever a time is not known yet: whether something has happened since it was asked for last."""
        run, now = self.run, 0.0
        forwards = backwards = 0
        for work in works:
            if work.kind == "update":
                run.busy_s += work.seconds
                now += work.seconds
                continue
            if work.kind == "forward":
                number, source, target = forwards, self.features_in, self.features_out
                forwards += 1
            else:
                number, source, target = backwards, self.gradients_in, self.gradients_out
                backwards += 1
            if source is not None:
                source.ask(now)
                here = source.arrival(number)
                moved = True
                while here is None:
                    yield moved
                    moved = False
                    here = source.arrival(number)
                waited = max(0.0, here - now)
                if work.kind == "forward":
                    run.features_s += waited
                else:
                    run.gradients_s += waited
                now += waited
            run.busy_s += work.seconds
            now += work.seconds
            if target is not None:
                target.send(now)
                free = target.free(number)
                moved = True
                while free is None:
                    yield moved
                    moved = False
                    free = target.free(number)
                waited = max(0.0, free - now)
                run.sending_s += waited
                now += waited
        run.ended = now
