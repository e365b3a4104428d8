"""Which push, of whom and how stale, was which update: read from a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_stale.events import Event, Granted, Planned, Pushed, Refused, Updated


@dataclass(frozen=True)
class RecordedPush:
    """One push.

    ``step`` is how many the worker had pushed before, in this fit; ``staleness`` is in updates; ``batches``, where they
    were handed out, are those of the ``epoch`` from the first to the one before the last, among those that the fit had
    left of it.
    """

    worker: int
    step: int
    staleness: int
    epoch: int | None = None
    batches: tuple[int, int] | None = None

    def __str__(self) -> str:
        stale = "1 update" if self.staleness == 1 else f"{self.staleness} updates"
        text = f"rank {self.worker}, its step {self.step}, {stale} stale"
        if self.batches is None:
            return text
        first, end = self.batches
        which = f"batch {first}" if end == first + 1 else f"batches {first} to {end - 1}"
        return f"{text}, {which} of epoch {self.epoch}"


@dataclass(frozen=True)
class RecordedUpdate:
    """One update: its number, when it was made (seconds since the record begins), and what it was made of."""

    number: int
    at: float
    pushes: tuple[RecordedPush, ...]


def updates(events: Iterable[Event]) -> Iterator[RecordedUpdate]:
    """Yield the updates of a record, in order; under BSP, one has the pushes of a round.

    Example::

        >>> from lightning_stale.events import Pushed, Updated
        >>> from lightning_stale.recording.updates import updates
        >>> [update] = updates([Pushed(0.5, worker=1, staleness=3), Updated(0.5, updates=9)])
        >>> update.number, str(update.pushes[0])
        (9, 'rank 1, its step 0, 3 updates stale')
    """
    steps: Counter[int] = Counter()
    granted: dict[int, tuple[int, int]] = {}
    epoch: int | None = None
    began: float | None = None
    pushes: list[RecordedPush] = []
    for event in events:
        began = event.at if began is None else began
        match event:
            case Planned():
                epoch = event.epoch
            case Granted():
                granted[event.worker] = (event.first, event.last)
            case Pushed():
                batches = granted.get(event.worker)
                of = None if batches is None else epoch
                pushes.append(RecordedPush(event.worker, steps[event.worker], event.staleness, of, batches))
                steps[event.worker] += 1
            case Refused():
                pushes.pop()
            case Updated():
                yield RecordedUpdate(event.updates, event.at - began, tuple(pushes))
                pushes = []
