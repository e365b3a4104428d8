"""The data plane: a shard owns weights and optimizers, takes gradients, and gives weights with every OK."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import zmq
from torch import Tensor

from lightning_stale import events
from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.service import Peer, Plane, Service, fields_of, numbers
from lightning_stale.events.kinds import What
from lightning_stale.events.stale_sync import StaleSyncCounts
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.inspector import Inspector
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.transport import memory, wire
from lightning_stale.transport.delivery import Deliveries, Piece
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.links import ServerLink, SharedServerLink, StreamServerLink
from lightning_stale.transport.parcel import pack

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    link: ServerLink
    gradients: list[Tensor]  # what it pushes, one view per slot
    pulled: int = -1  # the updates that it holds: all at its last whole pull, and its own since then
    whole: int = -1  # the version of its last whole pull
    message: dict[str, Any] | None = None  # the push (or change) whose chunks are on their way
    missing: int = 0  # bytes of it
    own: list[tuple[int, int]] | None = None  # what its last push has changed; None: it takes all weights
    pulls: bool = True  # when all have met
    staleness: int = 0  # of its last push
    applied: bool = True  # whether the rule let it be
    then: list[Tensor] | None = None  # the weights that it holds, one view per slot, if the rule needs them


class Shard(Plane):
    """Owns weights and the optimizers that update them, for the workers of a run.

    Args:
        service: moves the messages; its coordinator has the gate.
        store: the weights and the optimizers.
        layout: of the store's weights.
        world_size: the number of workers that it starts with.
        folder: where shared memory is made.
        counts: what summaries and checkpoints hold of the run so far.
        record: is told what happens.
        grows: whether others may join.
        inspector: looks at every push of a run that is recorded, or replayed.
    """

    def __init__(
        self,
        service: Service,
        store: ParameterStore,
        layout: Layout,
        world_size: int,
        folder: str,
        counts: StaleSyncCounts,
        record: Callable[[events.Event], None],
        grows: bool = False,
        inspector: Inspector | None = None,
    ) -> None:
        assert service.coordinator.paradigm is not None
        super().__init__(service)
        self._paradigm: Paradigm = service.coordinator.paradigm
        self._store = store
        self._layout = layout
        self._world_size = world_size
        self._alone = world_size == 1 and not grows  # one set of weights for both
        self._folder = folder
        self._counts = counts
        self._record = record
        self._inspector = inspector
        self._workers: dict[int, _Worker] = {}
        self._round: dict[tuple[int, int], Push] = {}  # BSP: the pushes that wait for the step with their mean, by peer
        self._segments: list[memory.Segment] = []  # that nobody has yet
        self._deliveries = Deliveries(self._send_chunk)
        self._deposit = bytearray()  # what who joins anew begins with
        self._deposited = False  # all of it is here
        self._handlers: dict[str, Callable[[Peer, _Worker, dict[str, Any]], None]] = {
            "unshare": self._on_unshare,
            "push": self._on_push,
            "change": self._on_change,
            "more": self._on_more,
            "summary": self._on_summary,
        }
        self._in_turn: dict[What, Callable[[Peer, _Worker, dict[str, Any]], None]] = {
            "pull": self._on_pull,
            "optimizer_state": self._on_optimizer_state,
            "snapshot": self._on_snapshot,
            "deposit": self._on_deposit,
            "deposited": self._on_deposited,
        }
        self.kinds = {"chunk", *self._handlers, *self._in_turn}
        service.plane = self

    def resume(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from the clocks of a checkpoint; all workers join anew, where the furthest of them was."""
        now = self._service.now()
        if snapshot["paradigm"] == type(self._paradigm).__name__:
            self._paradigm.load_state_dict(snapshot["state"])
            for worker in list(self._paradigm.clocks):
                self._paradigm.leave(worker, now)
        self._store.version = snapshot["updates"]
        self._counts.load_state_dict(snapshot)
        self._store.resume_rule(snapshot.get("apply"))

    def prepare_segments(self, count: int, report: Callable[[], None]) -> None:
        """Make the shared memory of ``count`` workers before they connect, which they do not do for ever.

        Args:
            count: how many are on this host.
            report: called after each, which takes a while where they are large.
        """
        for _ in range(count):
            self._segments.append(memory.create_segment(2 * self._layout.nbytes, self._folder))
            report()

    # --- connections ------------------------------------------------------------------------------------------------

    def welcome(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        nbytes = 2 * self._layout.nbytes
        segment = self._segment(message, nbytes)
        if segment is None:
            self._link(peer, self._stream())
            return {"path": "", "token": b"", "nbytes": nbytes}
        link = SharedServerLink(segment)
        self._link(peer, link)
        if self._alone:  # one set of weights for both: what the worker does to them itself counts
            self._store.move_to(link.weights, self._layout)
        return {"path": segment.path, "token": segment.token, "nbytes": nbytes}

    def _segment(self, message: dict[str, Any], nbytes: int) -> memory.Segment | None:
        if not message["shared"]:
            return None
        if self._segments:
            return self._segments.pop()
        try:
            return memory.create_segment(nbytes, self._folder)
        except memory.SharedMemoryError as error:
            if not message["anew"]:
                raise
            log.warning("rank %d, which joins, goes without shared memory: %s", message["rank"], error)
            return None  # it finds no path, and asks for bytes by TCP; a run that goes on does not end for this

    def gone(self, peer: Peer) -> None:
        self._deliveries.end(peer.identity)
        if peer.member in self._workers:
            self._workers[peer.member].link.close()

    def receive(self, peer: Peer, message: dict[str, Any], frames: Sequence[zmq.Frame]) -> None:
        worker, kind = self._workers[peer.member], message["type"]
        if kind == "chunk":
            self._on_chunk(peer, worker, message, frames)
        elif kind in self._in_turn:
            self._service.take(peer, kind, lambda: self._in_turn[kind](peer, worker, message))
        else:
            self._handlers[kind](peer, worker, message)

    def _on_unshare(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        self._link(peer, self._stream())

    def _stream(self) -> ServerLink:
        return StreamServerLink(self._layout.nbytes, keeps=self._store.rule.needs_weights_then and not self._alone)

    def _link(self, peer: Peer, link: ServerLink) -> None:
        worker = self._workers[peer.member] = _Worker(link, self._layout.views(link.gradients))
        if self._store.rule.needs_weights_then:
            worker.then = self._store.views if link.weights is None else self._layout.views(link.weights)

    def _on_more(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        self._deliveries.send_more(peer.identity)

    def _send_chunk(self, identity: bytes, offset: int, data: memoryview) -> None:
        self._service.send_frames(identity, wire.encode_message("chunk", offset=offset), data)

    def _send(self, peer: Peer, kind: str, pieces: Sequence[Piece] = (), **fields: Any) -> None:
        nbytes = sum(data.numel() for _, data in pieces)
        self._service.send(peer, kind, nbytes=nbytes, **fields)
        if nbytes:
            self._deliveries.begin(peer.identity, pieces)

    # --- pushes -----------------------------------------------------------------------------------------------------

    def _on_push(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        if not 0 <= message["optimizer"] < len(self._store.optimizers):
            raise wire.WireError(f"a push for optimizer {message['optimizer']}")
        if len(message["used"]) != len(self._store.places(message["optimizer"])):
            raise wire.WireError(f"a push for {len(message['used'])} parameters")
        message["leases"] = numbers(message["leases"])
        self._await_chunks(peer, worker, message)

    def _on_change(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        """The only worker has set weights itself: the server's are the same from now on."""
        places = message["places"]
        if not self._alone or not all(isinstance(p, int) and 0 <= p < len(self._layout.slots) for p in places):
            raise wire.WireError(f"a change of the weights {places}")
        self._await_chunks(peer, worker, message)

    def _await_chunks(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        kind, nbytes = message["type"], message["nbytes"]
        if worker.message is not None or not 0 <= nbytes <= self._layout.nbytes:
            raise wire.WireError(f"a {kind} of {nbytes} bytes, with {worker.missing} of the last one missing")
        worker.message, worker.missing = message, nbytes
        if worker.missing == 0:
            self._take(peer, worker)

    def _on_chunk(self, peer: Peer, worker: _Worker, message: dict[str, Any], frames: Sequence[zmq.Frame]) -> None:
        data = frames[2].buffer if len(frames) == 3 else memoryview(b"")
        if worker.message is None or not 0 < len(data) <= worker.missing:
            raise wire.WireError(f"a chunk of {len(data)} bytes at {message['offset']} that belongs to no push")
        worker.link.take(message["offset"], memoryview(data))
        worker.missing -= len(data)
        if worker.missing == 0:
            self._take(peer, worker)

    def _take(self, peer: Peer, worker: _Worker) -> None:
        message, worker.message = worker.message, None
        assert message is not None
        take = self._take_change if message["type"] == "change" else self._take_push
        self._service.take(peer, message["type"], lambda: take(peer, worker, message))

    def _take_change(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        self._deliveries.keep()
        self._store.set_weights(message["places"], worker.gradients)

    def _take_push(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        pushed = m.Push(peer.member, peer.generation, message["leases"], message["asks"], message["commits"])
        coordinator = self._service.coordinator
        if coordinator.failure is None and not coordinator.refuses(pushed):
            self._accept(peer, worker, message, coordinator.is_new(pushed, message["optimizer"]))
        self._service.tell(pushed)

    def _accept(self, peer: Peer, worker: _Worker, message: dict[str, Any], is_new: bool) -> None:
        push = Push(
            optimizer=message["optimizer"],
            used=message["used"],
            gradients=worker.gradients,
            options=message["options"],
            clip=None if message["clip"] is None else tuple(message["clip"]),
            worker=peer.member,
            staleness=self._store.version - worker.pulled,
            weights_then=worker.then,
            lasting=not message["whole"],
        )
        worker.staleness, worker.applied = push.staleness, is_new
        self._note_times(peer, message)
        self._record(events.Pushed(self._service.now(), peer.member, worker.staleness))
        if self._inspector is not None:
            self._inspector.look_at(push, self._store, self._service.turns, self._service.now())
        if is_new and self._paradigm.averages:
            self._round[peer.member, peer.generation] = push
        elif is_new:
            worker.applied = self._apply(lambda: self._store.apply(push))
        if not worker.applied:
            self._record(events.Refused(self._service.now(), peer.member))
        worker.own = None
        if not message["whole"]:
            worker.own = self._layout.ranges(self._changed_by(push)) if worker.applied else []

    def _apply(self, step: Callable[[], bool]) -> bool:
        self._deliveries.keep()
        applied = step()
        if applied:
            self._record(events.Updated(self._service.now(), self._store.version))
            if self._inspector is not None:
                self._inspector.note_update(self._store)
        return applied

    def _changed_by(self, push: Push) -> list[int]:
        """Return the slots of the weights that a plain Trainer's optimizer would have changed in this step."""
        places = self._store.places(push.optimizer)
        if self._alone:
            return places
        return [place for place, used in zip(places, push.used, strict=True) if used]

    def before(self, replies: Sequence[m.Reply]) -> None:
        """Take the step of a round that is complete."""
        if self._round and any(isinstance(reply, m.RoundOver) for reply in replies):
            self._apply(lambda: self._store.apply_mean([self._round[who] for who in sorted(self._round)]))
            self._round.clear()

    def released(self, peer: Peer, reply: m.Released) -> None:
        worker = self._workers[peer.member]
        fields = {"clock": reply.clock, "lead": reply.lead, "staleness": worker.staleness, "applied": worker.applied}
        grant = None if reply.grant is None else astuple(reply.grant)
        self._give_weights(peer, worker, "released", worker.own, grant=grant, **fields)

    def granted(self, peer: Peer, reply: m.Granted) -> None:
        self._give_weights(peer, self._workers[peer.member], "granted", grant=astuple(reply.grant))

    def _give_weights(
        self, peer: Peer, worker: _Worker, kind: str, own: list[tuple[int, int]] | None = None, **fields: Any
    ) -> None:
        """Let a worker have the weights of now, with a message.

        Args:
            peer: who waits.
            worker: the same.
            kind: of the message.
            own: the byte ranges of those that its push has changed, if it wants no others yet.
            **fields: of the message.
        """
        ranges = own or []
        if own is None:
            ranges = [(0, self._layout.nbytes)] if worker.whole != self._store.version else []
            worker.pulled = worker.whole = self._store.version
        else:
            worker.pulled += worker.applied
        pieces = worker.link.give(self._store.weights, ranges)
        self._send(peer, kind, pieces, version=self._store.version, **fields)

    # --- meeting points ---------------------------------------------------------------------------------------------

    def arrives(self, peer: Peer, message: dict[str, Any]) -> None:
        self._note_times(peer, message)
        self._workers[peer.member].pulls = message["pull"]

    def met(self, peer: Peer, reply: m.Met) -> None:
        worker = self._workers[peer.member]
        fields = fields_of(reply)
        if worker.pulls:
            self._give_weights(peer, worker, "synced", **fields)
        else:
            self._send(peer, "synced", version=worker.whole, **fields)

    def _note_times(self, peer: Peer, message: dict[str, Any]) -> None:
        self._record(events.Spent(self._service.now(), peer.member, message["wait_s"], message["compute_s"]))

    # --- who joins anew ---------------------------------------------------------------------------------------------

    def _on_deposit(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        if peer.member != 0:
            raise wire.WireError("a deposit, which is rank 0's")
        if self._deposited:
            self._deposit, self._deposited = bytearray(), False
        self._deposit += message["part"]
        if message["last"]:
            self._deposited = True
            self._service.tell(m.Prepared())

    def _on_deposited(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        self._reply(peer, torch.frombuffer(self._deposit, dtype=torch.uint8))

    # --- questions --------------------------------------------------------------------------------------------------

    def _on_pull(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        self._give_weights(peer, worker, "synced", thresholds=self._paradigm.thresholds, members=[])

    def thresholds_set(self, peer: Peer, reply: m.ThresholdsSet) -> None:
        self._reply(peer, reply.problem)

    def _on_optimizer_state(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        if not 0 <= message["optimizer"] < len(self._store.optimizers):
            raise wire.WireError(f"a question about optimizer {message['optimizer']}")
        self._reply(peer, self._store.optimizer_state(message["optimizer"]))

    def _on_snapshot(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        leases = self._service.coordinator.leases
        self._reply(
            peer,
            {
                "paradigm": type(self._paradigm).__name__,
                "state": self._paradigm.state_dict(),
                "world_size": self._world_size,
                "apply": self._store.rule_state(),
                "leases": None if leases is None else leases.state_dict(),
                **self._counts.state_dict(),
            },
        )

    def _on_summary(self, peer: Peer, worker: _Worker, message: dict[str, Any]) -> None:
        rules = {"paradigm": repr(self._paradigm), "thresholds": self._paradigm.thresholds}
        self._reply(peer, {**rules, "apply": repr(self._store.rule), **self._counts.summary()})

    def _reply(self, peer: Peer, value: Any) -> None:
        parcel = pack(value)
        self._send(peer, "reply", parcel.pieces, size=parcel.size, head=parcel.head)
