"""The one place that is told what happens; it keeps nothing itself, and hands every event to its readers."""

from __future__ import annotations

from typing import Protocol

from lightning_stale.events.kinds import Event


class Reader(Protocol):
    """Derives something from events: counts, a timeline, a replay."""

    def note(self, event: Event) -> None:
        """Take ``event`` into account; those that are of no interest are passed over."""


class Recorder:
    """Hands each event to all readers, in the order in which it happens.

    Args:
        *readers: told first to last.

    Example::

        >>> from lightning_stale.events import Pushed, Recorder
        >>> class Count:
        ...     pushes = 0
        ...     def note(self, event):
        ...         self.pushes += isinstance(event, Pushed)
        >>> count = Count()
        >>> recorder = Recorder(count)
        >>> recorder.record(Pushed(at=0.5, worker=1, staleness=3))
        >>> count.pushes
        1
    """

    def __init__(self, *readers: Reader) -> None:
        self._readers = list(readers)

    def add(self, reader: Reader) -> None:
        """Tell ``reader`` too, of what comes from now on."""
        self._readers.append(reader)

    def record(self, event: Event) -> None:
        """Tell the readers of ``event``."""
        for reader in self._readers:
            reader.note(event)
