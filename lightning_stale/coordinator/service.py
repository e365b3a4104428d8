"""The loop around the coordinator: messages from the socket, replies into it, and who is at its other ends."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import chain, count
from typing import Any

import zmq

from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import Plan
from lightning_stale.events.kinds import What
from lightning_stale.recording.turns import ReplayError, Turns
from lightning_stale.transport import wire
from lightning_stale.transport.sockets import ServerSocket

log = logging.getLogger(__name__)

_REMIND_S = 30


@dataclass
class Peer:
    """The other end of a connection: a member, as one of its generations."""

    member: int
    generation: int
    identity: bytes
    connection: int  # its descriptor
    closed: bool = False


@dataclass(frozen=True)
class Greeting:
    """A connection that has said who it is, and does not take part yet."""

    identity: bytes
    connection: int
    message: dict[str, Any]


class Plane:
    """What travels beside the control messages, on the same connections; by itself, nothing does.

    Args:
        service: moves the messages.
    """

    kinds: Collection[str] = ()
    """The types of the messages that are its own."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def welcome(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of the answer to ``message``, a ``"hello"``."""
        return {"path": "", "token": b"", "nbytes": 0}

    def receive(self, peer: Peer, message: dict[str, Any], frames: Sequence[zmq.Frame]) -> None:
        """Take one of its own messages.

        Raises:
            WireError: if it makes no sense.
        """
        raise NotImplementedError

    def before(self, replies: Sequence[m.Reply]) -> None:
        """Do what is to be done before anybody hears of ``replies``."""

    def released(self, peer: Peer, reply: m.Released) -> None:
        """Tell ``peer`` its OK."""
        raise NotImplementedError

    def granted(self, peer: Peer, reply: m.Granted) -> None:
        """Tell ``peer`` which batches it may begin."""
        self._service.send(peer, "granted", version=0, grant=list(astuple(reply.grant)), nbytes=0)

    def arrives(self, peer: Peer, message: dict[str, Any]) -> None:
        """``peer`` comes to a meeting point, with ``message``."""

    def met(self, peer: Peer, reply: m.Met) -> None:
        """Tell ``peer`` that all have met."""
        self._service.send(peer, "synced", version=0, nbytes=0, **fields_of(reply))

    def thresholds_set(self, peer: Peer, reply: m.ThresholdsSet) -> None:
        """Tell ``peer`` about its thresholds."""
        raise NotImplementedError

    def gone(self, peer: Peer) -> None:
        """``peer`` is there no more."""


class Service:
    """Serves the members of a run until all of them are gone.

    Args:
        socket: where they connect.
        coordinator: decides.
        name: of the process, in what it tells of itself.
        turns: in which order messages are taken, and at what times.

    Attributes:
        plane: what travels beside.
    """

    def __init__(
        self,
        socket: ServerSocket,
        coordinator: Coordinator,
        name: str = "coordinator",
        turns: Turns | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.plane = Plane(self)
        self.turns = turns or Turns()
        self.now = self.turns.now
        self._socket = socket
        self._name = name
        self._peers: dict[int, Peer] = {}
        self._by_identity: dict[bytes, Peer] = {}
        self._connections: dict[int, Peer] = {}  # of those that are gone too, as long as they are open
        self._greetings: dict[int, Greeting] = {}  # by ticket
        self._tickets = count(1)
        self._stranger_logged = False

    def run(self, lifeline: int, orphaned: Callable[[], bool]) -> None:
        """Serve until every member has said goodbye, or rank 0 is gone.

        Args:
            lifeline: a descriptor that reads as closed when rank 0 closes it, or ends.
            orphaned: whether rank 0 has ended (a process it has forked may hold the lifeline open).
        """
        poller = zmq.Poller()
        for source in (self._socket.router, self._socket.monitor, lifeline):
            poller.register(source, zmq.POLLIN)
        silent_s = 0
        while not self.coordinator.over:
            ready = dict(poller.poll(1_000))
            silent_s = 0 if ready else silent_s + 1
            awaited = self.turns.awaited() if silent_s == _REMIND_S else None
            if awaited is not None:
                log.warning(
                    "The replay has waited for %d s: in the record %s, and that has not come", silent_s, awaited
                )
            self.drain()
            if self._socket.monitor in ready:
                self.note_connections()
            if (lifeline in ready and not os.read(lifeline, 1)) or orphaned():
                self.drain()
                if not self.coordinator.over:
                    self.tell(m.Fail(f"rank 0, which started the {self._name}, has ended before the others"))
                break
        self._send_newcomers_away("over", "the fit has ended")

    # --- from the members -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take all messages that have come."""
        for frames in self._messages():
            self._receive(frames)

    def _messages(self) -> Iterator[list[zmq.Frame]]:
        while not self.coordinator.over:
            try:
                yield self._socket.router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return

    def _receive(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        peer = self._by_identity.get(identity)
        try:
            message = wire.decode_message(frames[1].bytes if len(frames) > 1 else b"")
        except wire.WireError as error:
            self._ignore_or_fail(peer, error)
            return
        if peer is None:
            connection = int(frames[1].get(zmq.SRCFD))
            self._attempt(None, lambda: self._greet(identity, connection, message))
        elif message["type"] in self.plane.kinds:
            self._attempt(peer, lambda: self.plane.receive(peer, message, frames))
        else:
            self._attempt(peer, lambda: self._control(peer, message))

    def take(self, peer: Peer, what: What, handle: Callable[[], object]) -> None:
        """Have a message of ``peer`` taken by ``handle`` when it is its turn."""
        self.turns.take(peer.member, what, handle)

    def _attempt(self, peer: Peer | None, handle: Callable[[], object]) -> None:
        try:
            handle()
        except wire.WireError as error:
            self._ignore_or_fail(peer, error)
        except ReplayError as error:
            self.tell(m.Fail(str(error)))
        except Exception:  # the user's optimizer, mostly: the workers show it
            self.tell(m.Fail(f"the {self._name} failed:\n{traceback.format_exc()}"))

    def _ignore_or_fail(self, peer: Peer | None, error: wire.WireError) -> None:
        if peer is None:
            self._log_stranger(str(error))
        else:
            self.tell(m.Fail(f"rank {peer.member} sent what the {self._name} cannot read: {error}"))

    def _control(self, peer: Peer, message: dict[str, Any]) -> None:
        who = (peer.member, peer.generation)
        match message["type"]:
            case "sync":
                if message["region"]:  # it may come here because of who is gone, and is not to meet that one
                    self.note_connections()
                self.take(peer, "sync", lambda: self._arrive(peer, message))
            case "request":
                leases, kept = numbers(message["leases"]), numbers(message["kept"])
                request = m.Request(*who, leases, plan_of(message["plan"]), kept, message["steps"])
                self.take(peer, "request", lambda: self.tell(request))
            case "progress":
                self.take(peer, "progress", lambda: self._tell_progress(peer))
            case "thresholds":
                if not all(isinstance(name, str) for name in message["values"]):
                    raise wire.WireError(f"thresholds={message['values']!r}")
                self.take(peer, "thresholds", lambda: self.tell(m.SetThresholds(*who, message["values"])))
            case "ping":
                self.note_connections()
                self.send(peer, "pong", now=time.monotonic())
            case "abort":
                self.note_connections(aborting=peer)  # who was killed comes before those that fail because of it
                self.take(peer, "abort", lambda: self._abort(peer, message))
            case "bye":
                self.take(peer, "bye", lambda: self._dismiss(peer))
            case unexpected:
                raise wire.WireError(f"unexpected {unexpected!r}")

    def _arrive(self, peer: Peer, message: dict[str, Any]) -> None:
        self.plane.arrives(peer, message)
        self.tell(m.Arrive(peer.member, peer.generation, message["place"], message["detail"], message["region"]))

    def _tell_progress(self, peer: Peer) -> None:
        if self.coordinator.leases is None:
            raise wire.WireError("a question about batches, and nobody hands them out")
        self.send(peer, "trained", leases=self.coordinator.leases.state_dict())

    def _abort(self, peer: Peer, message: dict[str, Any]) -> None:
        self.tell(m.Abort(peer.member, peer.generation, message["kind"], message["text"]))
        if peer.closed:
            self._dismiss(peer)

    def _greet(self, identity: bytes, connection: int, message: dict[str, Any]) -> None:
        if message["type"] != "hello":
            raise wire.WireError(f"a {message['type']!r} message from a connection that has not said who it is")
        self.note_connections()  # a stranger's may have had the same descriptor before
        greeting = Greeting(identity, connection, message)
        self.turns.take(message["rank"], "hello", lambda: self._let_in(greeting))

    def _let_in(self, greeting: Greeting) -> None:
        message, ticket = greeting.message, next(self._tickets)
        join = m.Join(message["rank"], message["pid"], message["anew"], ticket)
        self._greetings[ticket] = greeting
        try:
            self.tell(join)
        except ValueError as error:
            greeting = self._greetings.pop(ticket)
            if message["anew"]:
                self._send_away(greeting, "error", str(error))
            raise wire.WireError(str(error)) from None

    def _welcome(self, joined: m.Joined) -> None:
        greeting = self._greetings.pop(joined.ticket)
        identity, connection = greeting.identity, greeting.connection
        peer = Peer(joined.member, joined.generation, identity, connection)
        # so that it hears of what fails below
        self._peers[peer.member] = self._by_identity[identity] = self._connections[connection] = peer
        if not self._socket.is_open(connection):  # what it has said came a moment before its end
            self._lose(peer)
        elif self.coordinator.failure is None:
            fields = self.plane.welcome(peer, greeting.message)
            self.send(peer, "welcome", rank=peer.member, generation=peer.generation, **fields)

    def _send_newcomers_away(self, kind: str, text: str) -> None:
        for ticket, greeting in list(self._greetings.items()):
            del self._greetings[ticket]
            self.coordinator.handle(m.Withdraw(ticket), self.now())
            self._send_away(greeting, kind, text)

    def _send_away(self, greeting: Greeting, kind: str, text: str) -> None:
        self.send_frames(greeting.identity, wire.encode_message("failed", kind=kind, text=text))

    # --- to the members ---------------------------------------------------------------------------------------------

    def tell(self, message: m.Message) -> None:
        """Have the coordinator hear ``message``, and its members the replies."""
        replies = self.coordinator.handle(message, self.now())
        self.plane.before(replies)
        self._deliver(replies)
        if self.coordinator.failure is not None:
            self.turns.ended()
            if self._greetings:
                self._send_newcomers_away(self.coordinator.failure.kind, self.coordinator.failure.text)

    def send(self, peer: Peer, kind: str, /, **fields: Any) -> None:
        """Send a message, without bytes behind it."""
        self.send_frames(peer.identity, wire.encode_message(kind, **fields))

    def send_frames(self, identity: bytes, *frames: bytes | memoryview) -> None:
        """Send frames to the connection that ``identity`` names; to one that has ended, nothing."""
        try:
            self._socket.router.send_multipart([identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # gone: the monitor says so too, and there it is handled
                raise
            if identity in self._by_identity:
                self.plane.gone(self._by_identity[identity])

    def _deliver(self, replies: Sequence[m.Reply]) -> None:
        for reply in replies:
            if isinstance(reply, m.Joined):
                self._welcome(reply)
                continue
            peer = self._peers.get(reply.member)
            if peer is not None:
                self._deliver_to(peer, reply)

    def _deliver_to(self, peer: Peer, reply: m.Reply) -> None:
        match reply:
            case m.Released():
                self.plane.released(peer, reply)
            case m.Granted():
                self.plane.granted(peer, reply)
            case m.Refused():
                self.send(peer, "refused", lease=reply.lease)
            case m.Met():
                self.plane.met(peer, reply)
            case m.ThresholdsSet():
                self.plane.thresholds_set(peer, reply)
            case m.Failed():
                self.send(peer, "failed", kind=reply.kind, text=reply.text)
            case m.Aborted():
                self.send(peer, "aborted", cause=reply.cause)
            case m.Fenced() | m.RoundOver():
                pass  # its connection has ended, or the next one of its rank has begun; the plane has seen to it
            case _:
                raise NotImplementedError(reply)

    # --- connections ------------------------------------------------------------------------------------------------

    def note_connections(self, aborting: Peer | None = None) -> None:
        """See which connections have ended.

        Args:
            aborting: says itself why it ends.
        """
        before = dict(self._connections)  # who says hello while we drain may have the descriptor of one that has ended
        closed, refused = self._socket.closed_connections()
        self.drain()  # what a worker sent before its connection ended, e.g. its goodbye
        for connection in closed:
            peer = before.get(connection)
            if peer is None:
                refused = not self._withdraw(connection) or refused
                continue
            peer.closed = True
            if self._connections.get(connection) is peer:
                del self._connections[connection]
            if peer is not aborting and self._peers.get(peer.member) is peer:
                self._attempt(peer, partial(self.turns.lose, peer.member, partial(self._lose, peer)))
        if refused:
            self._log_stranger("a connection that is not a worker's was closed")

    def _withdraw(self, connection: int) -> bool:
        """See to it that who waits to take part does so no more; return whether it was one of them."""
        tickets = [ticket for ticket, greeting in self._greetings.items() if greeting.connection == connection]
        for ticket in tickets:
            del self._greetings[ticket]
            self.tell(m.Withdraw(ticket))
        return bool(tickets)

    def _lose(self, peer: Peer) -> None:
        self._forget(peer)
        self.tell(m.Lose(peer.member, peer.generation))

    def lose_as_recorded(self, member: int) -> None:
        """In the run that is replayed, ``member`` was lost here: so it is now."""
        peer = self._peers[member]
        self.send(peer, "lost")
        self._lose(peer)

    def _dismiss(self, peer: Peer) -> None:
        self._forget(peer)
        self.tell(m.Leave(peer.member, peer.generation))

    def _forget(self, peer: Peer) -> None:
        if self._peers.get(peer.member) is peer:
            del self._peers[peer.member], self._by_identity[peer.identity]
            self.plane.gone(peer)

    def _log_stranger(self, what: str) -> None:
        if not self._stranger_logged:
            self._stranger_logged = True
            log.warning("The %s ignored a stranger on its port (logged once): %s", self._name, what)


def fields_of(met: m.Met) -> dict[str, Any]:
    """Return what a member is told of a meeting, as the fields of a message."""
    return {"thresholds": dict(met.thresholds), "members": list(chain.from_iterable(met.members))}


def numbers(values: list[Any]) -> tuple[int, ...]:
    """Return what came as a list of integers.

    Raises:
        WireError: if it is something else.
    """
    if not all(type(value) is int for value in values):  # a bool is none
        raise wire.WireError(f"{values!r} where numbers belong")
    return tuple(values)


def plan_of(values: list[Any] | None) -> Plan | None:
    """Return the plan whose fields came as a list.

    Raises:
        WireError: if they are not as many integers.
    """
    if values is None:
        return None
    if len(values) != len(fields(Plan)):
        raise wire.WireError(f"{values!r} is no plan of an epoch")
    return Plan(*numbers(values))
