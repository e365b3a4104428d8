"""The server: applies pushes, and holds each OK back until the paradigm's gate opens."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zmq
from torch import Tensor

from lightning_stale.coordinator.meetings import DifferentPlacesError, Meeting
from lightning_stale.events.summaries import RunStatistics
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.transport import memory, wire
from lightning_stale.transport.delivery import Deliveries, Piece
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.parcel import pack
from lightning_stale.transport.sockets import ServerSocket

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    rank: int
    identity: bytes
    connection: int  # the descriptor of its connection
    pid: int
    gradients: Tensor  # its buffers, in the store's layout: shared with it, or filled from its chunks
    weights: Tensor | None  # None: it is sent chunks
    gradient_views: list[Tensor]
    pulled: int = -1  # the updates that it holds: all at its last whole pull, and its own since then
    whole: int = -1  # the version of its last whole pull
    message: dict[str, Any] | None = None  # the push (or change) whose chunks are on their way
    missing: int = 0  # bytes of it
    own: list[tuple[int, int]] | None = None  # what its last push has changed; None: it takes all weights
    pulls: bool = True  # when all have met
    staleness: int = 0  # of its last push
    finished: bool = False


class ParameterServer:
    """Owns the weights, the optimizers and the paradigm, and serves ``world_size`` workers until all have finished.

    Args:
        socket: where the workers connect.
        store: the weights and the optimizers.
        layout: of the store's weights.
        paradigm: the gate.
        world_size: the number of workers.
        folder: where shared memory is made.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        socket: ServerSocket,
        store: ParameterStore,
        layout: Layout,
        paradigm: Paradigm,
        world_size: int,
        folder: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = socket
        self._store = store
        self._layout = layout
        self._paradigm = paradigm
        self._world_size = world_size
        self._folder = folder
        self._now = now
        self._workers: dict[int, _Worker] = {}
        self._by_identity: dict[bytes, _Worker] = {}
        self._round: dict[int, Push] = {}  # BSP: the pushes that wait for the step with their mean
        self._meeting = Meeting(world_size)
        self._statistics = RunStatistics(world_size, paradigm.thresholds)
        self._segments: list[memory.Segment] = []  # that nobody has yet
        self._deliveries = Deliveries(self._send_chunk)
        self._failure: dict[str, str] | None = None
        self._stranger_logged = False
        self._handlers: dict[str, Callable[[_Worker, dict[str, Any]], None]] = {
            "unshare": self._on_unshare,
            "push": self._on_push,
            "change": self._on_change,
            "more": self._on_more,
            "sync": self._on_sync,
            "pull": self._on_pull,
            "thresholds": self._on_thresholds,
            "optimizer_state": self._on_optimizer_state,
            "snapshot": self._on_snapshot,
            "summary": self._on_summary,
            "abort": self._on_abort,
            "bye": self._on_bye,
        }

    def resume(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from the clocks of a checkpoint; all workers join anew, where the furthest of them was."""
        if snapshot["paradigm"] == type(self._paradigm).__name__:
            self._paradigm.load_state_dict(snapshot["state"])
            for worker in list(self._paradigm.clocks):
                self._paradigm.leave(worker, self._now())
        self._store.version = snapshot["updates"]
        if snapshot["world_size"] == self._world_size:
            self._statistics.load_state_dict(snapshot)
        self._statistics.note_thresholds(self._paradigm.thresholds, self._store.version)

    def prepare_segments(self, count: int, report: Callable[[], None]) -> None:
        """Make the shared memory of ``count`` workers before they connect, which they do not do for ever.

        Args:
            count: how many are on this host.
            report: called after each, which takes a while where they are large.
        """
        for _ in range(count):
            self._segments.append(memory.create_segment(2 * self._layout.nbytes, self._folder))
            report()

    def run(self, lifeline: int, orphaned: Callable[[], bool]) -> None:
        """Serve until every worker has said goodbye, or rank 0 is gone.

        Args:
            lifeline: a descriptor that reads as closed when rank 0 closes it, or ends.
            orphaned: whether rank 0 has ended (a process it has forked may hold the lifeline open).
        """
        poller = zmq.Poller()
        for source in (self._socket.router, self._socket.monitor, lifeline):
            poller.register(source, zmq.POLLIN)
        while not self._done():
            ready = dict(poller.poll(1_000))
            self._drain()
            if self._socket.monitor in ready:
                self._note_connections()
            if (lifeline in ready and not os.read(lifeline, 1)) or orphaned():
                self._drain()
                if not self._done():
                    self._fail("error", "rank 0, which started the parameter server, has ended before the others")
                return

    # --- messages ---------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        for frames in self._messages():
            self._handle(frames)

    def _messages(self) -> Iterator[list[zmq.Frame]]:
        while not self._done():
            try:
                yield self._socket.router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return

    def _handle(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        worker = self._by_identity.get(identity)
        try:
            message = wire.decode_message(frames[1].bytes if len(frames) > 1 else b"")
            if worker is None:
                self._on_hello(identity, int(frames[1].get(zmq.SRCFD)), message)
            elif message["type"] == "chunk":
                self._on_chunk(worker, message, frames)
            elif message["type"] in self._handlers:
                self._handlers[message["type"]](worker, message)
            else:
                raise wire.WireError(f"unexpected {message['type']!r}")
        except wire.WireError as error:
            if worker is None:
                self._log_stranger(str(error))
            else:
                self._fail("error", f"rank {worker.rank} sent what the parameter server cannot read: {error}")
        except Exception:  # the user's optimizer, mostly: the workers show it
            self._fail("error", f"the parameter server failed:\n{traceback.format_exc()}")

    def _send(self, worker: _Worker, kind: str, pieces: Sequence[Piece] = (), **fields: Any) -> None:
        nbytes = sum(data.numel() for _, data in pieces)
        self._send_to(worker.identity, wire.encode_message(kind, nbytes=nbytes, **fields))
        if nbytes:
            self._deliveries.begin(worker.identity, pieces)

    def _send_chunk(self, identity: bytes, offset: int, data: memoryview) -> None:
        self._send_to(identity, wire.encode_message("chunk", offset=offset), data)

    def _send_to(self, identity: bytes, *frames: bytes | memoryview) -> None:
        try:
            self._socket.router.send_multipart([identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # gone: the monitor says so too, and there it is handled
                raise
            self._deliveries.end(identity)

    def _on_more(self, worker: _Worker, message: dict[str, Any]) -> None:
        self._deliveries.send_more(worker.identity)

    def _on_hello(self, identity: bytes, connection: int, message: dict[str, Any]) -> None:
        if message["type"] != "hello" or not 0 <= message["rank"] < self._world_size:
            raise wire.WireError(f"a {message['type']!r} message from a connection that has not said who it is")
        rank, nbytes = message["rank"], self._layout.nbytes
        self._note_connections()  # a stranger's may have had the same descriptor before
        if rank in self._workers:
            raise wire.WireError(f"a second connection for rank {rank}")
        if not self._socket.is_open(connection):  # what it has said came a moment before its end
            self._workers[rank] = _Worker(rank, identity, connection, message["pid"], torch.empty(0), None, [])
            self._lose(self._workers[rank])
            return
        gradients = torch.zeros(0 if message["shared"] else nbytes, dtype=torch.uint8)
        views = [] if message["shared"] else self._layout.views(gradients)
        worker = _Worker(rank, identity, connection, message["pid"], gradients, None, views)
        self._workers[rank] = self._by_identity[identity] = worker  # so that it hears of what fails below
        if self._failure is not None:
            self._send_failure(worker)
            return
        path, token = "", b""
        if message["shared"]:
            segment = self._segments.pop() if self._segments else memory.create_segment(2 * nbytes, self._folder)
            path, token = segment.path, segment.token
            worker.gradients, worker.weights = segment.data[:nbytes], segment.data[nbytes:]
            worker.gradient_views = self._layout.views(worker.gradients)
            if self._world_size == 1:  # one set of weights for both: what the worker does to them itself counts
                self._store.move_to(worker.weights, self._layout)
        self._send_to(identity, wire.encode_message("welcome", path=path, token=token, nbytes=2 * nbytes))

    def _on_unshare(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.gradients, worker.weights = torch.zeros(self._layout.nbytes, dtype=torch.uint8), None
        worker.gradient_views = self._layout.views(worker.gradients)

    # --- pushes -----------------------------------------------------------------------------------------------------

    def _on_push(self, worker: _Worker, message: dict[str, Any]) -> None:
        if not 0 <= message["optimizer"] < len(self._store.optimizers):
            raise wire.WireError(f"a push for optimizer {message['optimizer']}")
        if len(message["used"]) != len(self._store.places(message["optimizer"])):
            raise wire.WireError(f"a push for {len(message['used'])} parameters")
        self._await_chunks(worker, message)

    def _on_change(self, worker: _Worker, message: dict[str, Any]) -> None:
        """The only worker has set weights itself: the server's are the same from now on."""
        places = message["places"]
        if self._world_size > 1 or not all(isinstance(p, int) and 0 <= p < len(self._layout.slots) for p in places):
            raise wire.WireError(f"a change of the weights {places}")
        self._await_chunks(worker, message)

    def _await_chunks(self, worker: _Worker, message: dict[str, Any]) -> None:
        kind, nbytes = message["type"], message["nbytes"]
        if worker.message is not None or not 0 <= nbytes <= self._layout.nbytes:
            raise wire.WireError(f"a {kind} of {nbytes} bytes, with {worker.missing} of the last one missing")
        worker.message, worker.missing = message, nbytes
        if worker.missing == 0:
            self._take(worker)

    def _on_chunk(self, worker: _Worker, message: dict[str, Any], frames: list[zmq.Frame]) -> None:
        data = frames[2].buffer if len(frames) == 3 else memoryview(b"")
        start, end = message["offset"], message["offset"] + len(data)
        if worker.message is None or not 0 < len(data) <= worker.missing or start < 0 or end > self._layout.nbytes:
            raise wire.WireError(f"a chunk of {len(data)} bytes at {start} that belongs to no push")
        worker.gradients.numpy()[start:end] = memoryview(data)
        worker.missing -= len(data)
        if worker.missing == 0:
            self._take(worker)

    def _take(self, worker: _Worker) -> None:
        message, worker.message = worker.message, None
        assert message is not None
        if message["type"] == "change":
            self._deliveries.keep()
            self._store.set_weights(message["places"], worker.gradient_views)
        elif self._failure is not None:
            self._send_failure(worker)
        else:
            self._take_push(worker, message)

    def _take_push(self, worker: _Worker, message: dict[str, Any]) -> None:
        push = Push(
            optimizer=message["optimizer"],
            used=message["used"],
            gradients=worker.gradient_views,
            options=message["options"],
            clip=None if message["clip"] is None else tuple(message["clip"]),
        )
        worker.own = None if message["whole"] else self._layout.ranges(self._changed_by(push))
        worker.staleness = self._store.version - worker.pulled
        self._statistics.workers[worker.rank].note_push(worker.staleness, message["wait_s"], message["compute_s"])
        if self._paradigm.averages:
            self._round[worker.rank] = push
        else:
            self._deliveries.keep()
            self._store.apply(push)
        self._release(self._paradigm.push(worker.rank, self._now()))

    def _changed_by(self, push: Push) -> list[int]:
        """Return the places of the weights that a plain Trainer's optimizer would have changed in this step."""
        places = self._store.places(push.optimizer)
        if self._world_size == 1:
            return places
        return [place for place, used in zip(places, push.used, strict=True) if used]

    def _release(self, ranks: list[int]) -> None:
        if self._round and ranks:
            self._deliveries.keep()
            self._store.apply_mean([self._round[rank] for rank in sorted(self._round)])
            self._round.clear()
        for rank in ranks:
            worker = self._workers[rank]
            lead = self._paradigm.lead(rank)
            self._statistics.note_release(rank, lead)
            fields = {"clock": self._paradigm.clocks[rank], "lead": lead, "staleness": worker.staleness}
            self._give_weights(worker, "released", worker.own, **fields)

    def _give_weights(
        self, worker: _Worker, kind: str, own: list[tuple[int, int]] | None = None, **fields: Any
    ) -> None:
        """Let ``worker`` have the weights of now: into its shared memory, or as chunks behind the message.

        Args:
            worker: who waits.
            kind: of the message.
            own: the byte ranges of those that its push has changed, if it wants no others yet.
            **fields: of the message.
        """
        ranges = own or []
        if own is None:
            ranges = [(0, self._layout.nbytes)] if worker.whole != self._store.version else []
            worker.pulled = worker.whole = self._store.version
        else:
            worker.pulled += 1
        if worker.weights is None:
            pieces = [(start, self._store.weights[start:end]) for start, end in ranges]
            self._send(worker, kind, pieces, version=self._store.version, **fields)
            return
        if worker.weights is not self._store.weights:
            for start, end in ranges:
                worker.weights[start:end].copy_(self._store.weights[start:end])
        self._send(worker, kind, version=self._store.version, **fields)

    # --- meeting points ---------------------------------------------------------------------------------------------

    def _on_sync(self, worker: _Worker, message: dict[str, Any]) -> None:
        if self._failure is not None:
            self._send_failure(worker)
            return
        self._statistics.workers[worker.rank].note_times(message["wait_s"], message["compute_s"])
        if worker.rank in self._paradigm.clocks:  # it pushes no more until all have met: nobody waits for it
            self._release(self._paradigm.leave(worker.rank, self._now()))
        worker.pulls = message["pull"]
        try:
            met = self._meeting.arrive(worker.rank, message["place"], message["detail"])
        except DifferentPlacesError as error:
            self._fail("error", str(error))
            return
        for rank in met:
            self._answer_sync(self._workers[rank])
            self._paradigm.join(rank, self._now())

    def _answer_sync(self, worker: _Worker) -> None:
        thresholds = self._paradigm.thresholds
        if worker.pulls:
            self._give_weights(worker, "synced", thresholds=thresholds)
        else:
            self._send(worker, "synced", version=worker.whole, thresholds=thresholds)

    # --- thresholds -------------------------------------------------------------------------------------------------

    def _on_thresholds(self, worker: _Worker, message: dict[str, Any]) -> None:
        if not all(isinstance(name, str) for name in message["values"]):
            raise wire.WireError(f"thresholds={message['values']!r}")
        try:
            released = self._paradigm.set_thresholds(self._now(), **message["values"])
        except ValueError as error:
            self._reply(worker, str(error))
            return
        self._statistics.note_thresholds(self._paradigm.thresholds, self._store.version)
        if self._failure is None:  # who waits knows of it
            self._release(released)
        self._reply(worker, None)

    # --- questions --------------------------------------------------------------------------------------------------

    def _on_pull(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.pulls = True
        self._answer_sync(worker)

    def _on_optimizer_state(self, worker: _Worker, message: dict[str, Any]) -> None:
        if not 0 <= message["optimizer"] < len(self._store.optimizers):
            raise wire.WireError(f"a question about optimizer {message['optimizer']}")
        self._reply(worker, self._store.optimizer_state(message["optimizer"]))

    def _on_snapshot(self, worker: _Worker, message: dict[str, Any]) -> None:
        self._reply(
            worker,
            {
                "paradigm": type(self._paradigm).__name__,
                "state": self._paradigm.state_dict(),
                "updates": self._store.version,
                "world_size": self._world_size,
                **self._statistics.state_dict(),
            },
        )

    def _on_summary(self, worker: _Worker, message: dict[str, Any]) -> None:
        self._reply(
            worker,
            {"paradigm": repr(self._paradigm), "updates": self._store.version, **self._statistics.summary()},
        )

    def _reply(self, worker: _Worker, value: Any) -> None:
        parcel = pack(value)
        self._send(worker, "reply", parcel.pieces, size=parcel.size, head=parcel.head)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_bye(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.finished = True

    def _on_abort(self, worker: _Worker, message: dict[str, Any]) -> None:
        self._note_connections(aborting=worker)  # who was killed comes before those that fail because of it
        cause = "" if self._failure is None else self._failure["text"]
        self._fail(message["kind"], f"rank {worker.rank} {message['text']}")
        self._send_to(worker.identity, wire.encode_message("aborted", cause=cause))

    def _done(self) -> bool:
        return len(self._workers) == self._world_size and all(worker.finished for worker in self._workers.values())

    def _note_connections(self, aborting: _Worker | None = None) -> None:
        # who says hello while what was sent is drained may have the descriptor of a connection that has ended
        of_workers = {worker.connection: worker for worker in self._workers.values()}
        closed, refused = self._socket.closed_connections()
        self._drain()  # what a worker sent before its connection ended, e.g. its goodbye
        for connection in closed:
            worker = of_workers.get(connection)
            if worker is None:
                refused = True
            elif worker is aborting:  # which says itself why
                worker.finished = True
            elif not worker.finished:
                self._lose(worker)
        if refused:
            self._log_stranger("a connection that is not a worker's was closed")

    def _lose(self, worker: _Worker) -> None:
        worker.finished = True
        self._deliveries.end(worker.identity)
        self._fail("error", f"rank {worker.rank} (process {worker.pid}) is gone: it was killed or has crashed")

    def _fail(self, kind: str, text: str) -> None:
        if self._failure is None:
            self._failure = {"kind": kind, "text": text}
            for worker in self._workers.values():
                if not worker.finished:
                    self._send_failure(worker)

    def _send_failure(self, worker: _Worker) -> None:
        assert self._failure is not None
        self._send_to(worker.identity, wire.encode_message("failed", **self._failure))

    def _log_stranger(self, what: str) -> None:
        if not self._stranger_logged:
            self._stranger_logged = True
            log.warning("The parameter server ignored a stranger on its port (logged once): %s", what)
