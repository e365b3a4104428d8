"""A member's end of the connection to the coordinator: messages, the failure that may come instead, and the end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from lightning_stale.failures import FailureKind, RunFailedError
from lightning_stale.transport import wire
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.sockets import WorkerSocket

Others = Literal["refuse", "skip", "keep"]
CONNECT_TIMEOUT_S = 60.0
QUESTION_TIMEOUT_S = 30.0
"""How long a member that ends waits for an answer: a server amid a step answers after it, one that hangs never."""
_ABORT_TIMEOUT_S = 5.0
_POLL_MS = 200


class ServerLostError(ConnectionError):
    """The process at the other end has ended."""


class Connection:
    """Sends messages, and waits for those that are to come.

    Args:
        name: of the process that hosts the coordinator, in errors.
        endpoint: where it is.
        credentials: of the run.
        rank: this member.
        check: called while waiting; raises to break off (a signal has come, say).

    Attributes:
        failure: why the run has failed, once this member has been told.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, credentials: Credentials, rank: int, check: Callable[[], None]
    ) -> None:
        self.rank = rank
        self.failure: RunFailedError | None = None
        self._socket = WorkerSocket(endpoint.address, credentials.server.public, credentials.worker)
        self._name, self._address, self._process = name, endpoint.address, endpoint.pid
        self._check = check
        self._inbox: deque[dict[str, Any]] = deque()  # what has come and was not waited for yet
        self._ending = False
        self._owes_aborted = False  # the abort has not been answered yet
        self._silent: ServerLostError | None = None

    def join(self, shared: bool = False, anew: bool = False) -> dict[str, Any]:
        """Say who is here, and return the ``"welcome"``.

        Args:
            shared: whether bytes are to go through shared memory.
            anew: while the run goes on: then it waits until it can take part, and :attr:`rank` may be another one.
        """
        self.send("hello", rank=self.rank, pid=os.getpid(), shared=shared, anew=anew)
        message = self.receive("welcome", deadline=None if anew else time.monotonic() + CONNECT_TIMEOUT_S)
        self.rank = message["rank"]
        return message

    # --- messages ---------------------------------------------------------------------------------------------------

    def send(self, kind: str, /, **fields: Any) -> None:
        """Send a message; it does not wait for anything."""
        self._socket.dealer.send(wire.encode_message(kind, **fields))

    def send_chunks(self, data: memoryview, ranges: Sequence[tuple[int, int]]) -> None:
        """Send the bytes ``ranges`` of ``data`` behind a message."""
        for first, last in ranges:
            for start, end in wire.chunks(first, last):
                self._socket.dealer.send_multipart([wire.encode_message("chunk", offset=start), data[start:end]])

    def ask(self, question: str, **fields: Any) -> None:
        """Send a question, which is answered also when the run has failed."""
        if self._silent is not None:
            raise self._silent
        if self._owes_aborted:  # what comes before that answers calls that were interrupted
            self.receive("aborted", self.patience(), failed_too=True, others="skip")
            self._owes_aborted = False
        self.send(question, **fields)

    def patience(self) -> float | None:
        """Return until when an answer is waited for; ``None``: for ever."""
        return time.monotonic() + QUESTION_TIMEOUT_S if self._ends else None

    def look(self) -> None:
        """Take what has come by now, without waiting; :attr:`failure` may be set after it."""
        try:
            while self._socket.wait(0):
                self._take(self._socket.dealer.recv_multipart(copy=False), None)
        except ConnectionError:
            raise self.failure or self._lost() from None

    def receive(
        self,
        kind: str,
        deadline: float | None = None,
        failed_too: bool = False,
        data: memoryview | None = None,
        others: Others = "refuse",
    ) -> dict[str, Any]:
        """Return the next message of ``kind``.

        Args:
            kind: what must come next.
            deadline: until when.
            failed_too: wait for it also when the run has failed: the server answers nevertheless.
            data: where the bytes behind it are written; their number becomes the message's ``"nbytes"``.
            others: what happens to messages of other kinds: they are an error, passed over, or kept for later.

        Raises:
            RunFailedError: if the run has failed, and not ``failed_too``.
            ServerLostError: if the process at the other end has ended, or ``deadline`` is over.
        """
        while True:
            message = self._find(kind, others)
            if message is not None:
                return message
            if self._await(deadline):
                failed = self._take(self._socket.dealer.recv_multipart(copy=False), data)
                if failed and not failed_too:
                    assert self.failure is not None
                    raise self.failure

    def _find(self, kind: str, others: Others) -> dict[str, Any] | None:
        kept: list[dict[str, Any]] = []
        found = None
        while self._inbox and found is None:
            message = self._inbox.popleft()
            if message["type"] == kind:
                found = message
            elif others == "refuse":
                raise wire.WireError(f"expected {kind!r} from the {self._name}, got {message['type']!r}")
            elif others == "keep":
                kept.append(message)
        if kept:
            self._inbox.extendleft(reversed(kept))
        return found

    def _await(self, deadline: float | None) -> bool:
        try:
            if self._socket.wait(_POLL_MS):
                return True
        except ConnectionError:
            raise self.failure or self._lost() from None
        if not self._ends:
            self._check()
        if deadline is not None and time.monotonic() > deadline:
            if self._ends:
                self._silent = ServerLostError(
                    f"the {self._name} (process {self._process}) does not answer rank {self.rank} any more: it hangs, "
                    "most likely in the step of an optimizer"
                )
                raise self._silent
            raise ServerLostError(
                f"rank {self.rank} has waited in vain for the {self._name} at {self._address}, or for other workers to "
                "reach it: is the port open between the hosts, and MASTER_ADDR the address of rank 0's host?"
            )
        return False

    def _take(self, frames: list[Any], data: memoryview | None) -> bool:
        """Put what has come into the inbox; return whether it was a failure, which is noted instead."""
        message = wire.decode_message(frames[0].bytes)
        if message["type"] == "lost":
            self._be_lost()
        if message["type"] == "failed":
            self.failure = RunFailedError(message["kind"], message["text"])
            return True
        if data is not None and message["type"] == "chunk":
            start, part = message["offset"], memoryview(frames[1].buffer)
            data[start : start + len(part)] = part
            message["nbytes"] = len(part)
        self._inbox.append(message)
        return False

    def _be_lost(self) -> NoReturn:
        """Die as the one that this process replays has died: without a word to anybody."""
        print(f"rank {self.rank} was lost here in the run that is replayed, and is now", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody survives this")

    def _lost(self) -> ServerLostError:
        return ServerLostError(
            f"rank {self.rank} has lost the {self._name} ({self._address}, process {self._process}): it was killed or "
            "has crashed (what it printed stands above; resume from the last checkpoint with "
            "trainer.fit(ckpt_path=...)), or it has given this rank up, which gave no sign of life for too long"
        )

    # --- the end ----------------------------------------------------------------------------------------------------

    def abort(self, kind: FailureKind, text: str) -> RunFailedError | None:
        """Tell all members that this one fails; return what had failed before.

        Where several fail, the others' errors are mostly about the first (a broken connection, say).
        """
        self.begin_to_end()
        text = text.encode(errors="replace")[-wire.HEADER_BYTES // 2 :].decode(errors="replace")
        self.send("abort", kind=kind, text=text)
        try:  # an interrupted call may have left replies that nobody has read
            message = self.receive("aborted", time.monotonic() + _ABORT_TIMEOUT_S, failed_too=True, others="skip")
        except (ServerLostError, RunFailedError):
            self._owes_aborted, self._silent = True, None
            return self.failure
        self.failure = self.failure or RunFailedError(kind, text)
        return RunFailedError("error", message["cause"]) if message["cause"] else None

    def begin_to_end(self) -> None:
        """Wait no longer than :data:`QUESTION_TIMEOUT_S` for the answer to a question from now on."""
        self._ending = True

    @property
    def _ends(self) -> bool:
        return self._ending or self.failure is not None

    def close(self, finished: bool) -> None:
        """End the connection, with a goodbye if this member has finished or the run has failed.

        Without one, it is taken for lost.
        """
        if finished or self.failure is not None:
            self.send("bye")
        self._socket.close()

    def drop(self) -> None:
        """End the connection without a word."""
        self._socket.drop()
