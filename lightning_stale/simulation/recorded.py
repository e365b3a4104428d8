"""What the events of a run say of its workers: how long they took for their steps, and what an exchange cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_stale.events import Event, Granted, Left, Met, Pushed, Released, Spent
from lightning_stale.simulation.cluster import Cluster
from lightning_stale.simulation.step_times import StepTimes


@dataclass(frozen=True)
class RecordedTimes:
    """The times of a recorded run of ``StaleSyncStrategy``.

    Args:
        computing: how long each worker computed before each push, by its own clock. With ``cluster``, for predictions.
        turnaround: from each OK to the worker's next push, as the server saw them: computing, and the exchange of this
            very step. On their own, they are the run once more.
        cluster: the mean time of an exchange, and of an update.
    """

    computing: StepTimes
    turnaround: StepTimes
    cluster: Cluster


@dataclass
class _Worker:
    computing: list[float] = field(default_factory=list)
    turnaround: list[float] = field(default_factory=list)
    spent: Spent | None = None
    ok_at: float | None = None
    pushed_at: float = 0.0
    held_s: float | None = None  # by the server, since its last push; None: something else has happened since


def step_times_of(events: Iterable[Event], name: str = "a recorded run") -> RecordedTimes:
    """Derive step times and the cost of an exchange from what was recorded, under whatever paradigm.

    A worker waits from its push to its OK, and says how long with its next message. The server knows how long it has
    held the OK back; the rest was the exchange. So nobody has to train with ``"asp"`` to find out what it costs.

    Args:
        events: of a server, in their order; those of other kinds are passed over.
        name: of the run, for titles.

    Raises:
        ValueError: if no worker has pushed.

    Example::

        >>> from lightning_stale.events import Met, Pushed, Released, Spent
        >>> from lightning_stale.simulation import step_times_of
        >>> run = [Met(0.0, 0), Spent(1.25, 0, wait_s=0.0, compute_s=1.0), Pushed(1.25, 0, staleness=0)]
        >>> run += [Released(1.25, 0, lead=1), Spent(3.0, 0, wait_s=0.5, compute_s=1.5), Pushed(3.0, 0, staleness=0)]
        >>> times = step_times_of(run)
        >>> times.computing.of, times.turnaround.of, times.cluster.exchange_s
        (((1.0, 1.5),), ((1.25, 1.75),), 0.5)
    """
    workers: dict[int, _Worker] = {}
    exchanges: list[float] = []
    updates: list[float] = []
    last_push = -1  # whose push was the last event of its kind
    for event in events:
        match event:
            case Spent():
                worker = workers.setdefault(event.worker, _Worker())
                worker.spent = event
                if worker.held_s is not None:
                    exchanges.append(max(0.0, event.wait_s - worker.held_s))
                    worker.held_s = None
            case Pushed():
                worker, last_push = workers.setdefault(event.worker, _Worker()), event.worker
                if worker.spent is not None and worker.ok_at is not None:
                    worker.computing.append(worker.spent.compute_s)
                    worker.turnaround.append(event.at - worker.ok_at)
                worker.spent = worker.ok_at = worker.held_s = None
                worker.pushed_at = event.at
            case Released():
                worker = workers.setdefault(event.worker, _Worker())
                worker.ok_at, worker.held_s = event.at, event.at - worker.pushed_at
                if event.worker == last_push:
                    updates.append(worker.held_s)
            case Granted() | Met():
                worker = workers.setdefault(event.worker, _Worker())
                worker.held_s = None  # its next message tells of more than one wait
                if worker.ok_at is None or isinstance(event, Met):
                    worker.ok_at = event.at
            case Left():
                workers.setdefault(event.worker, _Worker()).ok_at = None
    steps = [workers[number] for number in sorted(workers) if workers[number].computing]
    if not steps:
        raise ValueError(f"{name}: no worker has pushed a gradient: record a run of StaleSyncStrategy that trains")
    return RecordedTimes(
        StepTimes(name, tuple(tuple(worker.computing) for worker in steps)),
        StepTimes(name, tuple(tuple(worker.turnaround) for worker in steps)),
        Cluster(
            exchange_s=statistics.fmean(exchanges) if exchanges else 0.0,
            update_s=statistics.fmean(updates) if updates else 0.0,
        ),
    )
