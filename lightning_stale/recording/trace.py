"""From a run's events to a timeline: a row per worker or stage, and arrows from what one sends to where it arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from lightning_stale import events as e
from lightning_stale.recording.trace_file import TraceFile

SERVER = 1_000_000
"""The process of the server in the timeline; those of the workers are their ranks."""
_SHORTEST_US = 1.0
_NOTED_S = 1e-6
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
        self._batches: dict[int, tuple[int, int]] = {}
        self._arrows = 0
        self._pushed = (-1, 0.0)  # by whom the last push was, and when
        name_process(file, SERVER, "parameter server")

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
        yield _slice(at, at, SERVER, "push", {"worker": worker, "staleness": event.staleness})
        yield {"ph": "C", "name": "staleness", "pid": worker, "ts": _us(at), "args": {"updates": event.staleness}}
        yield from self._arrow("push", (at - 1e-6, worker), (at, SERVER))
        self._since[worker], self._pushed = (at, "wait for the OK"), (worker, at)

    def _end_wait(self, at: float, worker: int, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
        since, what = self._since.pop(worker, (at, ""))
        if not what or at <= since:
            return
        releaser, pushed_at = self._pushed
        if what != "wait for the OK" or pushed_at != at:
            yield _slice(since, at, worker, what, args)
            return
        yield _slice(since, at + 1e-6, worker, what, args)  # so that the arrow ends in it
        yield from self._arrow(f"released by worker {releaser}", (at, SERVER), (at + 0.5e-6, worker))

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
            name_process(self._file, worker, f"worker {worker}")


class AveragingTrace:
    """Writes what a rank records that averages: its steps, and beside them the average that is in flight.

    Args:
        file: where it is written.
        rank: whose it is.
        offset_s: what its clock is behind that of the run.
    """

    def __init__(self, file: TraceFile, rank: int, offset_s: float = 0.0) -> None:
        self._file, self._rank, self._offset_s = file, rank, offset_s
        self._end: float | None = None  # of what it did last
        name_process(file, rank, f"worker {rank}")
        for thread, name in enumerate(("trains", "average in flight")):
            file.name(ph="M", name="thread_name", pid=rank, tid=thread, args={"name": name})

    def note(self, event: e.Event) -> None:
        """See :class:`~lightning_stale.events.Recorder`."""
        at, rank = event.at + self._offset_s, self._rank
        match event:
            case e.Stepped():
                if self._end is not None:
                    self._file.write(_slice(self._end, at, rank, "step", {}))
                self._end = at
            case e.Exchanged():
                in_flight = _slice(
                    at - event.exchange_s, at, rank, "average", {"hidden_s": event.exchange_s - event.wait_s}
                )
                wait = _slice(at - event.wait_s, at, rank, "wait for the average", {})
                self._file.write({**in_flight, "tid": 1}, *([wait] if event.wait_s > _NOTED_S else []))
                self._end = at
            case e.RoundEnded():
                self._file.write(_instant(at, rank, "round ends"))


class StageTrace:
    """Writes what a rank records whose stages run a pipeline: a row per stage, and arrows from one to the next.

    Args:
        file: where it is written.
        offset_s: what its clock is behind that of the run.
    """

    def __init__(self, file: TraceFile, offset_s: float = 0.0) -> None:
        self._file, self._offset_s = file, offset_s
        self._known: set[int] = set()
        self._drains = 0  # batches are counted anew after each

    def note(self, event: e.Event) -> None:
        """See :class:`~lightning_stale.events.Recorder`."""
        at = event.at + self._offset_s
        match event:
            case e.StageRan():
                self._know(event.stage)
                self._file.write(_slice(at - event.busy_s, at, event.stage, event.work, {"batch": event.batch}))
            case e.Received():
                self._know(event.stage)
                queued = {"ph": "C", "name": f"{event.what} queued", "pid": event.stage, "ts": _us(at)}
                self._file.write(
                    _slice(at - event.wait_s, at, event.stage, f"wait for {event.what}", {"batch": event.batch}),
                    self._end_of_arrow("f", at - 1e-6, event),
                    {**queued, "args": {"messages": event.queued}},
                )
            case e.Sent():
                self._know(event.stage)
                self._file.write(
                    _slice(at - event.wait_s, at, event.stage, f"send {event.what}", {"batch": event.batch}),
                    self._end_of_arrow("s", at - event.wait_s, event),
                )
            case e.Elapsed():
                self._drains += 1

    def _end_of_arrow(self, phase: str, at: float, event: e.Received | e.Sent) -> dict[str, Any]:
        lower = event.stage - (event.what == "features") if phase == "f" else event.stage - (event.what == "gradients")
        which = (
            f"{event.what} {self._drains} {lower} {event.batch}"  # the same on both ranks, and a number: for Perfetto
        )
        number = int.from_bytes(hashlib.blake2b(which.encode(), digest_size=6).digest(), "big")
        arrow = {"id": number, "name": event.what, "cat": event.what}
        binding = {"bp": "e"} if phase == "f" else {}
        return {"ph": phase, **arrow, "pid": event.stage, "tid": 0, "ts": _us(at), **binding}

    def _know(self, stage: int) -> None:
        if stage not in self._known:
            self._known.add(stage)
            name_process(self._file, stage, f"stage {stage}")


def name_process(file: TraceFile, process: int, name: str) -> None:
    """Have a row of the timeline called ``name``, in the order of the numbers of processes."""
    file.name(ph="M", name="process_name", pid=process, args={"name": name})
    file.name(ph="M", name="process_sort_index", pid=process, args={"sort_index": process})


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
