"""The server: applies pushes, and holds each OK back until the paradigm's gate opens."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zmq
from torch import Tensor

from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server import memory, wire
from lightning_stale.parameter_server.layout import Layout
from lightning_stale.parameter_server.meeting import DifferentPlacesError, Meeting
from lightning_stale.parameter_server.socket import ServerSocket
from lightning_stale.parameter_server.statistics import RunStatistics
from lightning_stale.parameter_server.store import ParameterStore, Push

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
    pulled: int = -1  # the version that it holds
    message: dict[str, Any] | None = None  # the push whose chunks are on their way
    missing: int = 0  # bytes of it
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
        self._failure: dict[str, str] | None = None
        self._stranger_logged = False
        self._handlers: dict[str, Callable[[_Worker, dict[str, Any]], None]] = {
            "unshare": self._on_unshare,
            "push": self._on_push,
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

    def _send(self, worker: _Worker, kind: str, payload: Tensor | None = None, **fields: Any) -> None:
        self._send_to(worker, wire.encode_message(kind, nbytes=0 if payload is None else payload.numel(), **fields))
        if payload is not None:
            data = memoryview(payload.numpy())  # type: ignore[arg-type]
            for start, end in wire.chunks(0, len(data)):
                self._send_to(worker, wire.encode_message("chunk", offset=start), data[start:end])

    def _send_to(self, worker: _Worker, *frames: bytes | memoryview) -> None:
        try:
            self._socket.router.send_multipart([worker.identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # gone: the monitor says so too, and there it is handled
                raise

    def _on_hello(self, identity: bytes, connection: int, message: dict[str, Any]) -> None:
        if message["type"] != "hello" or not 0 <= message["rank"] < self._world_size:
            raise wire.WireError(f"a {message['type']!r} message from a connection that has not said who it is")
        rank, nbytes = message["rank"], self._layout.nbytes
        self._note_connections()  # a stranger's may have had the same descriptor before
        if rank in self._workers:
            raise wire.WireError(f"a second connection for rank {rank}")
        gradients = torch.zeros(nbytes, dtype=torch.uint8)
        worker = _Worker(rank, identity, connection, message["pid"], gradients, None, self._layout.views(gradients))
        self._workers[rank] = self._by_identity[identity] = worker  # so that it hears of what fails below
        if self._failure is not None:
            self._send_failure(worker)
            return
        path, token = "", b""
        if message["shared"]:
            segment = memory.create_segment(2 * nbytes, self._folder)
            path, token = segment.path, segment.token
            worker.gradients, worker.weights = segment.data[:nbytes], segment.data[nbytes:]
            worker.gradient_views = self._layout.views(worker.gradients)
            if self._world_size == 1:  # one set of weights for both: what the worker does to them itself counts
                self._store.move_to(worker.weights, self._layout)
        self._socket.router.send_multipart(
            [identity, wire.encode_message("welcome", path=path, token=token, nbytes=2 * nbytes)]
        )

    def _on_unshare(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.gradients, worker.weights = torch.zeros(self._layout.nbytes, dtype=torch.uint8), None
        worker.gradient_views = self._layout.views(worker.gradients)

    # --- pushes -----------------------------------------------------------------------------------------------------

    def _on_push(self, worker: _Worker, message: dict[str, Any]) -> None:
        if not 0 <= message["optimizer"] < len(self._store.optimizers):
            raise wire.WireError(f"a push for optimizer {message['optimizer']}")
        if len(message["used"]) != len(self._store.places(message["optimizer"])):
            raise wire.WireError(f"a push for {len(message['used'])} parameters")
        if worker.message is not None or not 0 <= message["nbytes"] <= self._layout.nbytes:
            raise wire.WireError(f"a push of {message['nbytes']} bytes, with {worker.missing} of the last one missing")
        worker.message, worker.missing = message, message["nbytes"]
        if worker.missing == 0:
            self._take_push(worker)

    def _on_chunk(self, worker: _Worker, message: dict[str, Any], frames: list[zmq.Frame]) -> None:
        data = frames[2].buffer if len(frames) == 3 else memoryview(b"")
        start, end = message["offset"], message["offset"] + len(data)
        if worker.message is None or not 0 < len(data) <= worker.missing or start < 0 or end > self._layout.nbytes:
            raise wire.WireError(f"a chunk of {len(data)} bytes at {start} that belongs to no push")
        worker.gradients.numpy()[start:end] = memoryview(data)
        worker.missing -= len(data)
        if worker.missing == 0:
            self._take_push(worker)

    def _take_push(self, worker: _Worker) -> None:
        message, worker.message = worker.message, None
        assert message is not None
        if self._failure is not None:
            self._send_failure(worker)
            return
        push = Push(
            optimizer=message["optimizer"],
            used=message["used"],
            gradients=worker.gradient_views,
            options=message["options"],
            clip=None if message["clip"] is None else tuple(message["clip"]),
        )
        worker.staleness = self._store.version - worker.pulled
        self._statistics.workers[worker.rank].note_push(worker.staleness, message["wait_s"], message["compute_s"])
        if self._paradigm.averages:
            self._round[worker.rank] = push
        else:
            self._store.apply(push)
        self._release(self._paradigm.push(worker.rank, self._now()))

    def _release(self, ranks: list[int]) -> None:
        if self._round and ranks:
            self._store.apply_mean([self._round[rank] for rank in sorted(self._round)])
            self._round.clear()
        for rank in ranks:
            worker = self._workers[rank]
            lead = self._paradigm.lead(rank)
            self._statistics.note_release(rank, lead)
            fields = {"clock": self._paradigm.clocks[rank], "lead": lead, "staleness": worker.staleness}
            self._give_weights(worker, "released", **fields)

    def _give_weights(self, worker: _Worker, kind: str, **fields: Any) -> None:
        """Let ``worker`` have the weights of now: into its shared memory, or as chunks behind the message."""
        stale = worker.pulled != self._store.version
        worker.pulled = self._store.version
        if worker.weights is None:
            self._send(worker, kind, self._store.weights if stale else None, version=worker.pulled, **fields)
        else:
            if stale and worker.weights is not self._store.weights:
                worker.weights.copy_(self._store.weights)
            self._send(worker, kind, version=worker.pulled, **fields)

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
            self._send(worker, "synced", version=worker.pulled, thresholds=thresholds)

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
        packed = bytearray(wire.encode_object(value))
        self._send(worker, "reply", torch.frombuffer(packed, dtype=torch.uint8))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_bye(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.finished = True

    def _on_abort(self, worker: _Worker, message: dict[str, Any]) -> None:
        self._note_connections(aborting=worker)  # who was killed comes before those that fail because of it
        cause = "" if self._failure is None else self._failure["text"]
        self._fail(message["kind"], f"rank {worker.rank} {message['text']}")
        self._send_to(worker, wire.encode_message("aborted", cause=cause))

    def _done(self) -> bool:
        return len(self._workers) == self._world_size and all(worker.finished for worker in self._workers.values())

    def _note_connections(self, aborting: _Worker | None = None) -> None:
        closed, refused = self._socket.closed_connections()
        self._drain()  # what a worker sent before its connection ended, e.g. its goodbye
        of_workers = {worker.connection: worker for worker in self._workers.values()}
        for connection in closed:
            worker = of_workers.get(connection)
            if worker is None:
                refused = True
            elif not worker.finished:
                worker.finished = True
                if worker is not aborting:  # which says itself why
                    text = f"rank {worker.rank} (process {worker.pid}) is gone: it was killed or has crashed"
                    self._fail("error", text)
        if refused:
            self._log_stranger("a connection that is not a worker's was closed")

    def _fail(self, kind: str, text: str) -> None:
        if self._failure is None:
            self._failure = {"kind": kind, "text": text}
            for worker in self._workers.values():
                if not worker.finished:
                    self._send_failure(worker)

    def _send_failure(self, worker: _Worker) -> None:
        assert self._failure is not None
        self._send_to(worker, wire.encode_message("failed", **self._failure))

    def _log_stranger(self, what: str) -> None:
        if not self._stranger_logged:
            self._stranger_logged = True
            log.warning("The parameter server ignored a stranger on its port (logged once): %s", what)
