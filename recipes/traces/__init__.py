"""Step times of real jobs, to replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_stale import StepTrace


def real_job(job: str, *, scale: float = 0.001, workers: Sequence[int] | None = None) -> StepTrace:
    """Return the trace of ``"SE"``, ``"AR"`` or ``"ST"``; see README.md in this folder.

    Example::

        >>> from recipes.traces import real_job
        >>> trace = real_job("AR")  # one of four workers is slow for good
        >>> [round(trace.seconds(rank, 0), 3) for rank in range(4)]
        [0.045, 0.02, 0.019, 0.019]
    """
    return StepTrace(Path(__file__).parent / "straggler_steps.csv.gz", job=job, scale=scale, workers=workers)
