"""Reads a log of the stages' times."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning_stale.simulation.log import in_order, read_rows, seconds_of
from lightning_stale.simulation.pipeline.stage_times import StageTimes

FORWARD_SHARE = 1 / 3
"""Of ``compute_s``, where a log does not tell forward and backward apart: a backward costs about two forwards."""
_Row = dict[str, dict[str, tuple[float, ...]]]  # stage -> step -> seconds of forward, backward, update


def read_stage_log(*paths: str | Path, job: str | None = None, worker: str | None = None) -> StageTimes:
    """Read CSV files (or ``.csv.gz``) with a line per stage and step.

    Args:
        paths: of one file, or of one per stage. The first line of each names the columns: ``stage``, ``step``, and
            ``forward_s`` and ``backward_s`` (without a second forward), or ``compute_s`` for both together, of which a
            third is the forward's then. ``update_s`` is what comes after the backward. Steps that not all stages have
            are left out.
        job: the lines of it only, where there is a column ``job``. May be left out if there is one job.
        worker: likewise, of a column ``worker``: several pipelines side by side.

    Raises:
        ValueError: if a column, the job or the worker is not there, or a time is no number.
    """
    times: _Row = {}
    seen: dict[str, set[str]] = {"job": set(), "worker": set()}
    for path in map(Path, paths):
        with read_rows(path, ("stage", "step")) as (rows, names):
            apart = "forward_s" in names and "backward_s" in names
            if not apart and "compute_s" not in names:
                raise ValueError(f"{path} has neither forward_s and backward_s nor compute_s, but {list(names)}")
            for row in rows:
                seen["job"].add(row.get("job", ""))
                if job not in (None, row.get("job", "")):
                    continue
                seen["worker"].add(row.get("worker", ""))
                if worker not in (None, row.get("worker", "")):
                    continue
                where = f"{path}:{rows.line_num}"
                if apart:
                    forward, backward = (seconds_of(row, column, where) for column in ("forward_s", "backward_s"))
                else:
                    whole = seconds_of(row, "compute_s", where)
                    forward, backward = FORWARD_SHARE * whole, (1 - FORWARD_SHARE) * whole
                update = seconds_of(row, "update_s", where) if "update_s" in names else 0.0
                times.setdefault(row["stage"], {})[row["step"]] = (forward, backward, update)
    path = Path(paths[0])
    for column, chosen in (("job", job), ("worker", worker)):
        if chosen is None and len(seen[column]) > 1:
            raise ValueError(
                f"{path} holds several {column}s, {_shown(seen[column])}: choose one, e.g. --{column} "
                f"{min(seen[column], key=in_order)}"
            )
        if chosen is not None and chosen not in seen[column]:
            raise ValueError(f"{path} has no {column} {chosen!r}: it holds {_shown(seen[column])}")
    if not times:
        raise ValueError(f"{path} has no line of job {job!r} and worker {worker!r}")
    stages = sorted(times, key=in_order)
    steps = sorted(set.intersection(*(set(times[stage]) for stage in stages)), key=in_order)
    if not steps:
        raise ValueError(f"{path}: stages {', '.join(stages)} have no step in common: log the same steps on all")

    def column_of(place: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(times[stage][step][place] for step in steps) for stage in stages)

    name = ", ".join([path.name, *(part for part in (job, worker and f"worker {worker}") if part)])
    return StageTimes(name, column_of(0), column_of(1), column_of(2))


def _shown(values: Iterable[str]) -> str:
    found = sorted(values, key=in_order)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
