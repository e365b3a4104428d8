"""What is counted of a pipeline: how long each stage has computed."""

from __future__ import annotations

from collections import defaultdict

from lightning_stale.events.kinds import Event, StageRan


class StageCounts:
    """Counts of the stages of one rank.

    Example::

        >>> from lightning_stale.events import StageRan
        >>> from lightning_stale.events.pipeline import StageCounts
        >>> counts = StageCounts()
        >>> for work in ("forward", "backward"):
        ...     counts.note(StageRan(0.5, stage=2, batch=0, work=work, busy_s=0.25))
        >>> dict(counts.busy_s)
        {2: 0.5}
    """

    def __init__(self) -> None:
        self.busy_s: defaultdict[int, float] = defaultdict(float)
        """Seconds, by stage."""

    def note(self, event: Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        if isinstance(event, StageRan):
            self.busy_s[event.stage] += event.busy_s
