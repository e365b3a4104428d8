"""Reads a log of step times."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_stale.simulation.step_times import StepTimes


def read_log(*paths: str | Path, job: str | None = None, column: str = "compute_s") -> StepTimes:
    """Read CSV files (or ``.csv.gz``) with a line per worker and step.

    Args:
        paths: of one file, or of one per worker. The first line of each names the columns; ``worker``, ``step`` and
            ``column`` must be there. If there is a ``stage``, the time of a worker in a step is that of its slowest
            stage. Steps that not all workers have are left out.
        job: the lines of it only, where there is a column ``job``. May be left out if there is one job.
        column: the one with the seconds.

    Raises:
        ValueError: if a column or the job is not there, or a time is no number.
    """
    jobs: set[str] = set()
    times: dict[str, dict[str, float]] = {}
    for path in map(Path, paths):
        with read_rows(path, ("worker", "step", column)) as (rows, _):
            for row in rows:
                of = row.get("job", "")
                jobs.add(of)
                if job not in (None, of):
                    continue
                seconds = seconds_of(row, column, f"{path}:{rows.line_num}")
                mine = times.setdefault(row["worker"], {})
                mine[row["step"]] = max(mine.get(row["step"], 0.0), seconds)
    path = Path(paths[0])
    if job is None and len(jobs) > 1:
        raise ValueError(f"{path} holds the jobs {', '.join(sorted(jobs))}: choose one, e.g. --job {min(jobs)}")
    if not times:
        raise ValueError(f"{path} has no step of job {job!r}: it holds {', '.join(map(repr, sorted(jobs))) or 'none'}")
    shared = set.intersection(*(set(mine) for mine in times.values()))
    workers = sorted(times, key=in_order)
    steps = sorted(shared, key=in_order)
    name = f"{path.name}, {job}" if job else path.name
    return StepTimes(name, tuple(tuple(times[worker][step] for step in steps) for worker in workers))


@contextmanager
def read_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[csv.DictReader[str], Sequence[str]]]:
    """Open a CSV file, compressed or not; enter its rows, and the names of its columns.

    Raises:
        ValueError: if one that is ``needed`` is not there.
    """
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or []
        missing = [name for name in needed if name not in names]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}, but {names}: which one has the seconds?")
        yield rows, names


def seconds_of(row: Mapping[str, str], column: str, where: str) -> float:
    """Return a time; ``where`` is for the error if it is none."""
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {column}={row[column]!r} is no number of seconds") from None


def in_order(text: str) -> tuple[float, str]:
    """Sort numbers by their value, and before all else."""
    return (float(text), text) if text.strip().isdigit() else (math.inf, text)
