"""From a run's events to a timeline: a row per worker, the server's, and arrows from a push to whom it releases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_stale import events as e
from lightning_stale.recording.trace_file import TraceFile

SERVER = 1_000_000
"""The process of the server in the timeline; those of the workers are their ranks."""
_SHORTEST_US = 1.0
_WAITS = {"request": "wait for a batch", "sync": "wait for the others"}


class StaleSyncTrace:
    """Writes what the server of a run records: a reader of a :class:`~lightning_stale.events.Recorder`.

    All times are the server's own, and how long a worker computed is what it says itself, up to its push: so the
    clocks of other hosts do not matter. Of each worker there are its computations, what it waits for (its OK, a batch,
    the others at a meeting), and the staleness of its pushes as a counter; of the server, the pushes. Arrows lead from
    a worker's computation to its push at the server, and from a push to whoever gets its OK for it.

    Args:
        file: where it is written.
    """

    def __init__(self, file: TraceFile) -> None:
        self._file = file
        self._known: set[int] = set()
        self._since: dict[int, tuple[float, str]] = {}  # who waits, since when and for what
        self._computed: dict[int, float] = {}  # seconds before the push that comes now
        self._batches: dict[int, tuple[int, int]] = {}
        self._arrows = 0
        self._pushed = (-1, 0.0)  # by whom the last push was, and when
        self._name(SERVER, "parameter server")

    def note(self, event: e.Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        traced = list(self._trace(event))
        if traced:
            self._file.write(*traced)

    def _trace(self, event: e.Event) -> Iterator[dict[str, Any]]:
        at = event.at
        match event:
            case e.Turn() if event.what in _WAITS:
                self._since[event.worker] = (at, _WAITS[event.what])
            case e.Spent():
                yield from self._compute(event)
            case e.Pushed():
                yield from self._push(event)
            case e.Refused():
                yield _instant(at, event.worker, "the rule lets it go")
            case e.Released():
                yield from self._end_wait(at, event.worker, {"lead": event.lead})
            case e.Granted():
                self._batches[event.worker] = (event.first, event.last)
                if self._since.get(event.worker, (0.0, ""))[1] == "wait for a batch":
                    yield from self._end_wait(at, event.worker, {"lease": event.lease})
            case e.Met():
                yield from self._end_wait(at, event.worker, {})
            case e.TakenBack():
                yield _instant(at, event.worker, f"lease {event.lease} is taken back")
            case e.Joined():
                self._know(event.worker)
                yield _instant(at, event.worker, "joins")
            case e.Left():
                self._since.pop(event.worker, None)
                yield _instant(at, event.worker, "is lost" if event.lost else "leaves")
            case e.ThresholdsSet():
                yield {"ph": "C", "name": "thresholds", "pid": SERVER, "ts": _us(at), "args": dict(event.thresholds)}
            case e.Failed():
                yield {**_instant(at, SERVER, f"the run fails: {event.text}"), "s": "g"}

    def _compute(self, event: e.Spent) -> Iterator[dict[str, Any]]:
        if event.compute_s > 0:
            self._know(event.worker)
            args = {}
            if event.worker in self._batches:
                args["batches"] = list(range(*self._batches[event.worker]))
            yield _slice(event.at - event.compute_s, event.at, event.worker, "compute", args)

    def _push(self, event: e.Pushed) -> Iterator[dict[str, Any]]:
        at, worker = event.at, event.worker
        yield {**_slice(at, at, SERVER, f"push of worker {worker}", {"staleness": event.staleness})}
        yield {"ph": "C", "name": "staleness", "pid": worker, "ts": _us(at), "args": {"updates": event.staleness}}
        yield from self._arrow("push", (at - 1e-6, worker), (at, SERVER))
        self._since[worker], self._pushed = (at, "wait for the OK"), (worker, at)

    def _end_wait(self, at: float, worker: int, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
        since, what = self._since.pop(worker, (at, ""))
        if not what or at <= since:
            return
        yield _slice(since, at, worker, what, args)
        releaser, pushed_at = self._pushed
        if what == "wait for the OK" and pushed_at == at:
            yield from self._arrow(f"released by worker {releaser}", (at, SERVER), (at - 1e-6, worker))

    def _arrow(self, name: str, start: tuple[float, int], end: tuple[float, int]) -> Iterator[dict[str, Any]]:
        self._arrows += 1
        for phase, (at, process) in (("s", start), ("f", end)):
            binding = {"bp": "e"} if phase == "f" else {}
            yield {
                "ph": phase, "id": self._arrows, "name": name, "cat": "push", "pid": process, "tid": 0,
                "ts": _us(at), **binding,
            }  # fmt: skip

    def _know(self, worker: int) -> None:
        if worker not in self._known:
            self._known.add(worker)
            self._name(worker, f"worker {worker}")

    def _name(self, process: int, name: str) -> None:
        self._file.name(ph="M", name="process_name", pid=process, args={"name": name})
        self._file.name(ph="M", name="process_sort_index", pid=process, args={"sort_index": process})


def _us(at: float) -> float:
    return round(at * 1e6, 3)


def _slice(start: float, end: float, process: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    duration = max(_us(end) - _us(start), _SHORTEST_US)
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": 0,
        "ts": _us(start),
        "dur": round(duration, 3),
        "args": args,
    }


def _instant(at: float, process: int, name: str) -> dict[str, Any]:
    return {"ph": "i", "s": "t", "name": name, "pid": process, "tid": 0, "ts": _us(at)}
