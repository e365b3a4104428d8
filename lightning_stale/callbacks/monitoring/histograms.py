"""Histograms in the loggers that can show them: TensorBoard and Weights & Biases, which need not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_stale.events.histogram import bucket, width

_MOST_BINS = 512
"""``wandb.Histogram`` refuses more; it would take staleness of a million updates."""


def log_histograms(loggers: Sequence[Logger], histograms: Mapping[str, Mapping[int, int]], step: int) -> None:
    """Log each of ``histograms`` in each of ``loggers`` that has histograms; the others are passed over.

    Args:
        loggers: of the Trainer.
        histograms: by name; how often each value came (:mod:`lightning_stale.events.histogram`).
        step: of the Trainer.
    """
    for logger in loggers:
        for name, counts in histograms.items():
            if not counts:
                continue
            kind = {base.__name__ for base in type(logger).__mro__}
            if "TensorBoardLogger" in kind:
                _to_tensorboard(logger, name, counts, step)
            elif "WandbLogger" in kind:
                _to_wandb(logger, name, counts, step)


def _to_tensorboard(logger: Any, name: str, counts: Mapping[int, int], step: int) -> None:
    """Log bins as they are: ``add_histogram`` would want every value, a million of them after a million pushes."""
    starts, times = bins(counts)
    logger.experiment.add_histogram_raw(
        name,
        min=starts[0],
        max=starts[-1],
        num=sum(times),
        sum=sum(value * n for value, n in counts.items()),
        sum_squares=sum(value**2 * n for value, n in counts.items()),
        bucket_limits=[start + width(start) - 0.5 for start in starts],
        bucket_counts=times,
        global_step=step,
    )


def _to_wandb(logger: Any, name: str, counts: Mapping[int, int], step: int) -> None:
    histogram: Any = importlib.import_module("wandb").Histogram
    starts, times = bins(counts)
    edges = [*starts[:_MOST_BINS], starts[-1] + width(starts[-1])]
    if len(times) > _MOST_BINS:
        times = [*times[: _MOST_BINS - 1], sum(times[_MOST_BINS - 1 :])]
    values = {name: histogram(np_histogram=(times, edges)), "trainer/global_step": step}
    logger.experiment.log(values)


def bins(counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Return where the bins from the smallest to the largest value begin, and how often each came, empty ones too.

    Example::

        >>> bins({3: 7, 5: 1})
        ([3, 4, 5], [7, 0, 1])
        >>> bins({62: 1, 66: 2})
        ([62, 63, 64, 66], [1, 0, 0, 2])
    """
    start, starts = bucket(min(counts)), []
    while start <= max(counts):
        starts.append(start)
        start += width(start)
    return starts, [counts.get(start, 0) for start in starts]
