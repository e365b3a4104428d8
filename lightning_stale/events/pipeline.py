"""What is counted of a pipeline: how long each stage has computed, what it waited for, and how full its queues were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_stale.events.kinds import Elapsed, Event, Received, Sent, StageRan, Travels


@dataclass
class OfStage:
    """Counts of one stage in training, the drains included; times in seconds."""

    busy_s: float = 0.0
    wait_s: dict[Travels, float] = field(default_factory=lambda: {"features": 0.0, "gradients": 0.0})
    wait_to_send_s: float = 0.0
    received: dict[Travels, int] = field(default_factory=lambda: {"features": 0, "gradients": 0})
    queued: dict[Travels, int] = field(default_factory=lambda: {"features": 0, "gradients": 0})  # found, in all

    def note(self, event: StageRan | Received | Sent) -> None:
        """Take ``event`` into account."""
        match event:
            case StageRan():
                self.busy_s += event.busy_s if event.work != "evaluation" else 0.0
            case Received():
                self.wait_s[event.what] += event.wait_s
                self.received[event.what] += 1
                self.queued[event.what] += event.queued
            case Sent():
                self.wait_to_send_s += event.wait_s

    def summary(self, elapsed_s: float) -> dict[str, Any]:
        """Return what the row of ``DSPStrategy.summary()`` has of it.

        Args:
            elapsed_s: how long its rank has trained.
        """
        return {
            "busy_s": self.busy_s,
            "utilisation": self.busy_s / elapsed_s if elapsed_s > 0 else 0.0,
            "wait_features_s": self.wait_s["features"],
            "wait_gradients_s": self.wait_s["gradients"],
            "wait_to_send_s": self.wait_to_send_s,
            "features_queued": self.mean_queue("features"),
            "gradients_queued": self.mean_queue("gradients"),
        }

    def numbers(self) -> list[float]:
        """Return all of them: seconds busy, and waiting for features, gradients and to send; received and queued."""
        wait_s, received, queued = self.wait_s, self.received, self.queued
        return [
            self.busy_s,
            wait_s["features"],
            wait_s["gradients"],
            self.wait_to_send_s,
            received["features"],
            queued["features"],
            received["gradients"],
            queued["gradients"],
        ]

    def mean_queue(self, what: Travels) -> float | None:
        """Return how many messages it found waiting on average; ``None`` if it receives none of ``what``."""
        return self.queued[what] / self.received[what] if self.received[what] else None


class StageCounts:
    """Counts of the stages of one rank.

    Example::

        >>> from lightning_stale.events import Elapsed, Received, StageRan
        >>> from lightning_stale.events.pipeline import StageCounts
        >>> counts = StageCounts()
        >>> for work in ("forward", "backward"):
        ...     counts.note(StageRan(0.5, stage=2, batch=0, work=work, busy_s=0.25))
        >>> counts.note(Received(0.5, stage=2, batch=0, what="features", wait_s=0.125, queued=0))
        >>> counts.note(Elapsed(1.0, elapsed_s=1.0))
        >>> row = counts.summary()[2]
        >>> row["busy_s"], row["utilisation"], row["wait_features_s"], row["features_queued"], row["gradients_queued"]
        (0.5, 0.5, 0.125, 0.0, None)
    """

    def __init__(self) -> None:
        self.stages: dict[int, OfStage] = {}
        self.total = OfStage()
        """Of all stages of this rank."""
        self.elapsed_s = 0.0
        """How long this rank has trained, up to the last meeting."""

    def note(self, event: Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        if isinstance(event, Elapsed):
            self.elapsed_s += event.elapsed_s
        elif isinstance(event, (StageRan, Received, Sent)):
            if event.stage not in self.stages:
                self.stages[event.stage] = OfStage()
            self.stages[event.stage].note(event)
            self.total.note(event)

    def summary(self) -> dict[int, dict[str, Any]]:
        """Return what the rows of ``DSPStrategy.summary()`` have of this rank's stages, by stage."""
        return {number: stage.summary(self.elapsed_s) for number, stage in self.stages.items()}


def of_all_ranks(
    rows: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[int, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return ``rows``, one per stage, with what the ranks have counted of theirs; a stage that has done nothing too."""
    found = {stage: counted for rank in ranks for stage, counted in rank.items()}
    nothing = OfStage().summary(0.0)
    return [{**row, **found.get(row["stage"], nothing)} for row in rows]
