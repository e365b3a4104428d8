"""Step times of real jobs, read from a file."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

COLUMNS = ("job", "worker", "stage", "step", "compute_s")

_Steps = dict[tuple[int, int], dict[int, float]]
"""(worker, stage): {step: seconds}."""


class StepTrace:
    r"""How long each step of each worker of a real job took, for :class:`StragglerInjection` to replay.

    The file is a CSV with the columns ``job, worker, stage, step, compute_s`` (seconds), in any order and with any
    others besides, e.g. made from the traces of Lin et al., *Understanding Stragglers in Large Model Training Using
    What-if Analysis*, OSDI 2025; ``recipes/traces/straggler_steps.csv.gz`` is one. The time of a worker in a step is
    that of its busiest stage. Steps are replayed in the order of their numbers; the first follows the last.

    Args:
        path: of the file; one that ends in ``.gz`` is unpacked.
        job: which one of the file; may be left out if there is one only.
        workers: for each rank, the worker of the trace whose times it takes; a worker may stand for several ranks. By
            default rank 0 is the first of them, rank 1 the second, and those that are too many are left out.
        scale: seconds of training per second of the trace, e.g. ``0.001``: a step of 20 s takes 20 ms.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column, a job, a worker or a step is missing, a time is no finite number above 0, a row is
            there twice, or ``scale`` is not a finite number above 0.

    Example::

        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_stale import StepTrace
        >>> rows = ["job,worker,stage,step,compute_s", "A,0,0,1,20", "A,0,0,2,21", "A,1,0,1,46", "A,1,0,2,45"]
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "steps.csv"
        ...     _ = path.write_text("\n".join(rows))
        ...     trace = StepTrace(path, scale=0.001)
        >>> [trace.seconds(rank=1, step=step) for step in range(3)]
        [0.046, 0.045, 0.046]
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        job: str | None = None,
        workers: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale={scale!r}: write seconds of training per second of the trace, > 0, e.g. 0.001")
        self.path, self.scale = Path(path), scale
        self.job, steps = _choose_job(self.path, _read(self.path), job)
        times = _busiest_stage(self.path, self.job, steps)
        self.chosen = workers is not None
        """Whether ``workers`` was given."""
        self.workers = tuple(sorted(times) if workers is None else workers)
        """The worker of the trace that stands for each rank."""
        for worker in self.workers:
            if worker not in times:
                raise ValueError(
                    f"workers={list(self.workers)}: job {self.job} of {self.path} has no worker {worker!r}; write some "
                    f"of {_short(sorted(times))}, one for each rank"
                )
        if not self.workers:
            raise ValueError(f"workers=[]: write some of {_short(sorted(times))}, one for each rank, or leave it out")
        self._times = [times[worker] for worker in self.workers]

    def seconds(self, rank: int, step: int) -> float:
        """Return how long step number ``step``, from 0, of ``rank`` takes, scaled; the first follows the last."""
        times = self._times[rank]
        return self.scale * times[step % len(times)]

    def __len__(self) -> int:
        """Return how many steps there are before the first comes again."""
        return len(self._times[0])

    def __repr__(self) -> str:
        return f"StepTrace({str(self.path)!r}, job={self.job!r}, workers={list(self.workers)}, scale={self.scale})"


def _read(path: Path) -> dict[str, _Steps]:
    if not path.is_file():
        raise FileNotFoundError(
            f"trace {path}: there is no such file (in {Path.cwd()}, if that path is relative); write the path of a CSV "
            f"with the columns {', '.join(COLUMNS)}"
        )
    jobs: dict[str, _Steps] = {}
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        try:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                found = ", ".join(reader.fieldnames or ["none"])
                raise ValueError(
                    f"trace {path}: it has no column {', '.join(absent)}, but {found}; write a CSV whose first line is "
                    f"{','.join(COLUMNS)}"
                )
            for row in reader:
                job, worker, stage, step, seconds = _parse(f"{path}, line {reader.line_num}", row)
                times = jobs.setdefault(job, {}).setdefault((worker, stage), {})
                if step in times:
                    raise ValueError(
                        f"trace {path}, line {reader.line_num}: step {step} of worker {worker}, stage {stage} of job "
                        f"{job} is there twice; add up what belongs to one step"
                    )
                times[step] = seconds
        except (UnicodeDecodeError, csv.Error, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"trace {path}: it is not a CSV, or not packed as its name says: {error}") from error
    return jobs


def _parse(place: str, row: dict[str, str | None]) -> tuple[str, int, int, int, float]:
    values = [row[name] or "" for name in COLUMNS]
    try:
        worker, stage, step = (int(value) for value in values[1:4])
        seconds = float(values[4])
    except ValueError:
        raise ValueError(
            f"trace {place}: {','.join(values)}: worker, stage and step are integers, and compute_s a number of seconds"
        ) from None
    if not 0 < seconds < math.inf:  # not a number is neither
        raise ValueError(f"trace {place}: compute_s={values[4]}: write seconds, > 0, or leave that step out for all")
    return values[0], worker, stage, step, seconds


def _choose_job(path: Path, jobs: dict[str, _Steps], job: str | None) -> tuple[str, _Steps]:
    if not jobs:
        raise ValueError(f"trace {path}: it has no steps")
    if job is None and len(jobs) == 1:
        (job,) = jobs
    if job is None or job not in jobs:
        raise ValueError(f"trace {path}: job={job!r}: write one of {', '.join(map(repr, sorted(jobs)))}")
    return job, jobs[job]


def _busiest_stage(path: Path, job: str, steps: _Steps) -> dict[int, list[float]]:
    """Return the times of each worker, in the order of the steps."""
    numbers = sorted({step for times in steps.values() for step in times})
    stages = sorted({stage for _, stage in steps})
    workers = sorted({worker for worker, _ in steps})
    for worker in workers:
        for stage in stages:
            absent = [step for step in numbers if step not in steps.get((worker, stage), {})]
            if absent:
                raise ValueError(
                    f"trace {path}: job {job} has no step {_short(absent)} of worker {worker}, stage {stage}; leave "
                    "such steps out for all, so that the workers' steps are those of the same moments"
                )
    return {worker: [max(steps[worker, stage][step] for stage in stages) for step in numbers] for worker in workers}


def _short(numbers: Iterable[int]) -> str:
    first, *rest = list(numbers)
    return ", ".join(map(str, [first, *rest])) if len(rest) < 8 else f"{first}, {rest[0]}, ... {rest[-1]}"
