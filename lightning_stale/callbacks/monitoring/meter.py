"""What is read of a strategy: by each batch of this worker, and of all together where its counts are at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

_NEVER = 1e-9  # seconds, instead of a division by nothing

Histograms = dict[str, Mapping[int, int]]
"""By what is counted: how often each value came."""


class Meter(ABC):
    """Gathers over the batches of this worker; names are those under which it is logged, without ``staleness/``."""

    def __init__(self) -> None:
        self._batches, self._seconds = 0, 0.0  # since they were last asked for
        self._batches_so_far = self._steps_so_far = 0
        self._batch_size: int | None = None

    def begin_batch(self) -> None:  # noqa: B027  # some read what has changed in a batch
        """Called when a batch begins."""

    def end_batch(self, seconds: float) -> None:
        """Called when it is over, after so many seconds, without those of loading it."""
        self._batches += 1
        self._batches_so_far += 1
        self._seconds += seconds

    def of_this_worker(self, batch_size: int | None) -> dict[str, float]:
        """Return means over the batches since this was last called; nothing if there is nothing to tell.

        Args:
            batch_size: of the last one, and so of all; ``None`` if that is not known.
        """
        values = self._of_this_worker()
        self._batch_size = batch_size
        if values and batch_size is not None:
            values["samples_per_s"] = self._batches * batch_size / max(self._seconds, _NEVER)
        if values:
            self._batches, self._seconds = 0, 0.0
        return values

    @abstractmethod
    def _of_this_worker(self) -> dict[str, float]:
        """Return the means, and begin anew."""

    def conditions(self) -> dict[str, float]:
        """Return what holds at the moment: thresholds."""
        return {}

    @abstractmethod
    def of_all(self, summary: Mapping[str, Any]) -> dict[str, float]:
        """Return what ``strategy.summary()`` says of all workers or stages."""

    @abstractmethod
    def line(self) -> dict[str, str]:
        """Return a short line for the progress bar, a name and a text; nothing before there is something to tell."""

    def histograms(self, summary: Mapping[str, Any]) -> Histograms:
        """Return those that ``strategy.summary()`` has of all together."""
        return {}

    def _samples_of_all(self, steps_per_s: float) -> dict[str, float]:
        """Return the samples per second of all workers.

        Args:
            steps_per_s: of all; each is taken to have as many samples as one of this worker's has had.
        """
        if self._batch_size is None or self._steps_so_far == 0:
            return {}
        return {"samples_per_s": steps_per_s * self._batch_size * self._batches_so_far / self._steps_so_far}


def share(part: float, rest: float) -> float:
    """Return how much of both ``part`` is, 0..1.

    Example::

        >>> share(1.0, 3.0), share(0.0, 0.0)
        (0.25, 0.0)
    """
    return part / max(part + rest, _NEVER)


def percent(value: float) -> str:
    """Return a share for the progress bar.

    Example::

        >>> percent(0.123)
        '12%'
    """
    return f"{value:.0%}"
