"""A worker's side: push a gradient, wait for the OK, pull the weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_stale.failures import RunFailedError
from lightning_stale.parameter_server.options import Options
from lightning_stale.transport import memory, wire
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.parcel import unpack
from lightning_stale.transport.sockets import WorkerSocket

Transport = Literal["auto", "shm", "tcp"]
CONNECT_TIMEOUT_S = 60.0
QUESTION_TIMEOUT_S = 30.0
"""How long a worker that ends waits for an answer: a server amid a step answers after it, one that hangs never."""
_ABORT_TIMEOUT_S = 5.0
_POLL_MS = 200


class ServerLostError(ConnectionError):
    """The parameter server has ended."""


@dataclass(frozen=True)
class Release:
    """An OK: the worker's clock and lead, the staleness of its push, and the version of the weights it pulled."""

    version: int
    clock: int
    lead: int
    staleness: int
    wait_s: float
    compute_s: float


class ParameterClient:
    """The connection of one worker.

    Args:
        endpoint: where the server is.
        credentials: of the run.
        rank: the worker's global rank.
        transport: ``"shm"``, ``"tcp"``, or ``"auto"``: shared memory on the server's host, TCP otherwise.
        check: called while waiting; raises to break off (a signal has come, say).

    Attributes:
        shared: whether the buffers are shared memory.
        buffer: the bytes behind both lists of tensors.
        gradients: one tensor per parameter; what lies there is pushed.
        weights: one tensor per parameter; holds the newest weights after each call that pulls.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: Credentials,
        rank: int,
        transport: Transport,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._check = check
        self.rank = rank
        self._socket = WorkerSocket(endpoint.address, credentials.server.public, credentials.worker)
        self._layout = Layout.from_message(endpoint.layout)
        self._wait_s = 0.0  # not yet reported
        self._compute_s = 0.0
        self._running_since: float | None = None
        self.last_release: Release | None = None
        self.failure: RunFailedError | None = None
        self._ending = False
        self._owes_aborted = False  # the server has not answered the abort yet
        self._silent: ServerLostError | None = None
        try:
            self.buffer, self._gradients, self._weights = self._connect(transport)
        except BaseException:
            self._socket.drop()
            raise
        self.gradients = self._layout.views(self._gradients)
        self.weights = self._layout.views(self._weights)

    # --- training ---------------------------------------------------------------------------------------------------

    def start_computing(self) -> None:
        """Note that the worker computes from now on, if it did not already (after a meeting point)."""
        if self._running_since is None:
            self._running_since = time.monotonic()

    def push(
        self,
        optimizer: int,
        places: Sequence[int],
        used: Sequence[bool],
        options: Options,
        clip: tuple[float, str] | None,
        whole: bool = True,
    ) -> Release:
        """Push the gradients of one optimizer, wait for the OK, and pull the weights.

        Args:
            optimizer: its index.
            places: which of the parameters are its own, in the order of its param groups.
            used: for each of them, whether there is a gradient.
            options: the values of its param groups.
            clip: value and ``"norm"`` or ``"value"``, to clip the mean of the round.
            whole: whether to pull all weights, or only those that have a gradient here: then call :meth:`refresh` once
                no graph is left that was computed with the others.

        Raises:
            RunFailedError: if the run has failed elsewhere.
            ServerLostError: if the server has ended.
        """
        self._stop_computing()
        compute_s = self._compute_s
        ranges = [] if self.shared else self._layout.ranges([p for p, u in zip(places, used, strict=True) if u])
        started = time.monotonic()
        self._send(
            "push",
            optimizer=optimizer,
            used=list(used),
            options=options,
            clip=None if clip is None else list(clip),
            whole=whole,
            nbytes=sum(end - start for start, end in ranges),
            **self._take_times(),
        )
        self._send_chunks(self._gradients, ranges)
        message = self._receive_weights("released")
        wait_s = time.monotonic() - started
        self._wait_s += wait_s
        self.last_release = Release(
            message["version"], message["clock"], message["lead"], message["staleness"], wait_s, compute_s
        )
        self.start_computing()
        return self.last_release

    def meet(self, place: str, detail: str, pull: bool = True, timeout_s: float = math.inf) -> dict[str, int]:
        """Wait until all workers are at ``place``.

        Args:
            place: a name that is the same on all workers.
            detail: what the error says besides if the names differ.
            pull: whether to pull the weights then; without it, the worker is taken to be amid a step.
            timeout_s: how long to wait.

        Returns:
            The thresholds of the paradigm, the same on all workers.

        Raises:
            RunFailedError: if the run has failed elsewhere, or the workers are at different places.
            ServerLostError: if the server has ended, or ``timeout_s`` is over.
        """
        self._stop_computing()
        started = time.monotonic()
        self._send("sync", place=place, detail=detail, pull=pull, **self._take_times())
        message = self._receive_weights("synced", deadline=started + timeout_s)
        self._wait_s += time.monotonic() - started
        if not pull:
            self.start_computing()
        thresholds: dict[str, int] = message["thresholds"]
        return thresholds

    def refresh(self) -> None:
        """Pull all weights of now, without waiting for anybody.

        Raises:
            RunFailedError: if the run has failed elsewhere.
            ServerLostError: if the server has ended.
        """
        started = time.monotonic()
        self._send("pull")
        self._receive_weights("synced")
        self._wait_s += time.monotonic() - started

    def pull(self) -> None:
        """As :meth:`refresh`, also when the run has failed."""
        self._ask_for("pull")
        self._receive_weights("synced", self._patience(), failed_too=True)

    def tell_changes(self, places: Sequence[int]) -> None:
        """Let the server have the :attr:`weights` at ``places`` as they are here; for the only worker of a run."""
        if self.shared or not places:  # its memory is the server's
            return
        ranges = self._layout.ranges(places)
        self._send("change", places=list(places), nbytes=sum(end - start for start, end in ranges))
        self._send_chunks(self._weights, ranges)

    def set_thresholds(self, thresholds: Mapping[str, int]) -> None:
        """Change thresholds of the paradigm; whoever that lets go on gets its OK at once.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for an impossible value.
        """
        refusal = self._ask("thresholds", values=dict(thresholds))
        if refusal is not None:
            raise ValueError(refusal)

    # --- questions --------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: int) -> dict[str, Any]:
        """Return the ``state_dict()`` of the server's optimizer; of its param groups, what ``step`` keeps there."""
        state_dict: dict[str, Any] = self._ask("optimizer_state", optimizer=optimizer)
        return state_dict

    def snapshot(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the server beside weights and optimizers: clocks and counts."""
        snapshot: dict[str, Any] = self._ask("snapshot")
        return snapshot

    def summary(self) -> dict[str, Any]:
        """Return the counts of all workers."""
        summary: dict[str, Any] = self._ask("summary")
        return summary

    # --- the end ----------------------------------------------------------------------------------------------------

    def abort(self, kind: str, text: str) -> RunFailedError | None:
        """Tell the server, and through it every worker, that this one fails; return what had failed before.

        Where several fail, the others' errors are mostly about the first (a broken connection, say).
        """
        self.begin_to_end()
        text = text.encode(errors="replace")[-wire.HEADER_BYTES // 2 :].decode(errors="replace")
        self._send("abort", kind=kind, text=text)
        try:  # an interrupted call may have left replies that nobody has read
            message = self._receive("aborted", time.monotonic() + _ABORT_TIMEOUT_S, failed_too=True, skip=True)
        except (ServerLostError, RunFailedError):
            self._owes_aborted, self._silent = True, None
            return self.failure
        self.failure = self.failure or RunFailedError(kind, text)
        return RunFailedError("error", message["cause"]) if message["cause"] else None

    def begin_to_end(self) -> None:
        """Wait no longer than :data:`QUESTION_TIMEOUT_S` for the answer to a question from now on."""
        self._ending = True

    def close(self, finished: bool) -> None:
        """End the connection, with a goodbye if this worker has finished or the run has failed.

        Without one, the server takes the worker for lost.
        """
        if finished or self.failure is not None:
            self._send("bye")
        self._socket.close()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _connect(self, transport: Transport) -> tuple[Tensor, Tensor, Tensor]:
        nbytes = self._layout.nbytes
        same_host = memory.supported() and self._endpoint.host_id == memory.host_id()
        if transport == "shm" and not same_host:
            raise memory.SharedMemoryError(
                f"transport='shm', but rank {self.rank} is not on the host of the parameter server "
                f"({self._endpoint.address}): write transport='auto' or 'tcp'"
            )
        self.shared = same_host and transport != "tcp"
        self._send("hello", rank=self.rank, pid=os.getpid(), shared=self.shared)
        message = self._receive("welcome", deadline=time.monotonic() + CONNECT_TIMEOUT_S)
        if self.shared:
            try:
                data = memory.open_segment(message["path"], message["nbytes"], message["token"])
                return data, data[:nbytes], data[nbytes:]
            except memory.SharedMemoryError:  # another container of the same host
                if transport == "shm":
                    raise
                self._send("unshare")
                self.shared = False
        data = torch.zeros(2 * nbytes, dtype=torch.uint8)
        return data, data[:nbytes], data[nbytes:]

    def _send(self, kind: str, /, **fields: Any) -> None:
        self._socket.dealer.send(wire.encode_message(kind, **fields))

    def _send_chunks(self, buffer: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        data = memoryview(buffer.numpy())  # type: ignore[arg-type]
        for first, last in ranges:
            for start, end in wire.chunks(first, last):
                self._socket.dealer.send_multipart([wire.encode_message("chunk", offset=start), data[start:end]])

    def _receive_weights(self, kind: str, deadline: float | None = None, failed_too: bool = False) -> dict[str, Any]:
        message = self._receive(kind, deadline, failed_too)
        self._receive_chunks(message["nbytes"], self._weights)
        return message

    def _ask(self, question: str, **fields: Any) -> Any:
        self._ask_for(question, **fields)
        reply = self._receive("reply", self._patience(), failed_too=True)
        parcel = torch.empty(reply["size"], dtype=torch.uint8)
        self._receive_chunks(reply["nbytes"], parcel)
        return unpack(parcel, reply["head"])

    def _ask_for(self, question: str, **fields: Any) -> None:
        if self._silent is not None:
            raise self._silent
        if self._owes_aborted:  # what comes before that answers calls that were interrupted
            self._receive("aborted", self._patience(), failed_too=True, skip=True)
            self._owes_aborted = False
        self._send(question, **fields)

    def _patience(self) -> float | None:
        return time.monotonic() + QUESTION_TIMEOUT_S if self._ends else None

    @property
    def _ends(self) -> bool:
        return self._ending or self.failure is not None

    def _receive(
        self,
        kind: str,
        deadline: float | None = None,
        failed_too: bool = False,
        data: Tensor | None = None,
        skip: bool = False,
    ) -> dict[str, Any]:
        """Return the next message of ``kind``.

        Args:
            kind: what must come next.
            deadline: until when.
            failed_too: wait for it also when the run has failed: the server answers nevertheless.
            data: where the bytes behind it are written.
            skip: pass over messages of other kinds.
        """
        while True:
            try:
                ready = self._socket.wait(_POLL_MS)
            except ConnectionError:
                raise self.failure or ServerLostError(
                    f"rank {self.rank} has lost the parameter server ({self._endpoint.address}, process "
                    f"{self._endpoint.pid}): it was killed or has crashed. What it printed stands above; "
                    "resume from the last checkpoint with trainer.fit(ckpt_path=...)."
                ) from None
            if not ready:
                if not self._ends:
                    self._check()
                if deadline is not None and time.monotonic() > deadline:
                    if self._ends:
                        self._silent = ServerLostError(
                            f"the parameter server (process {self._endpoint.pid}) does not answer rank {self.rank} any "
                            "more: it hangs, most likely in the step of an optimizer"
                        )
                        raise self._silent
                    raise ServerLostError(
                        f"rank {self.rank} has waited in vain for the parameter server at {self._endpoint.address}, or "
                        "for other workers to reach it: is the port open between the hosts, and MASTER_ADDR the "
                        "address of rank 0's host?"
                    )
                continue
            frames = self._socket.dealer.recv_multipart(copy=False)
            message = wire.decode_message(frames[0].bytes)
            if message["type"] == "failed":
                self.failure = RunFailedError(message["kind"], message["text"])
                if not failed_too:
                    raise self.failure
            elif message["type"] == kind:
                if data is not None:
                    start = message["offset"]
                    data.numpy()[start : start + len(frames[1].buffer)] = memoryview(frames[1].buffer)
                    message["nbytes"] = len(frames[1].buffer)
                return message
            elif not skip:
                raise wire.WireError(f"expected {kind!r} from the parameter server, got {message['type']!r}")

    def _receive_chunks(self, nbytes: int, into: Tensor) -> None:
        while nbytes > 0:
            nbytes -= self._receive("chunk", failed_too=True, data=into)["nbytes"]
            if nbytes > 0:
                self._send("more")

    # --- times ------------------------------------------------------------------------------------------------------

    def _stop_computing(self) -> None:
        if self._running_since is not None:
            self._compute_s += time.monotonic() - self._running_since
            self._running_since = None

    def _take_times(self) -> dict[str, float]:
        times = {"wait_s": self._wait_s, "compute_s": self._compute_s}
        self._wait_s = self._compute_s = 0.0
        return times
