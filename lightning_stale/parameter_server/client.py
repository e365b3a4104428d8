"""A worker's side: push a gradient, wait for the OK, pull the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_stale.coordinator.connection import Connection
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.failures import FailureKind, RunFailedError
from lightning_stale.parameter_server.options import Options
from lightning_stale.transport import memory
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.links import Ranges, SharedWorkerLink, StreamWorkerLink, WorkerLink
from lightning_stale.transport.parcel import unpack

Transport = Literal["auto", "shm", "tcp"]
_PART_BYTES = 2**20


@dataclass(frozen=True)
class Release:
    """An OK: the worker's clock and lead, the staleness of its push, and the version of the weights it pulled.

    ``applied`` is false where the apply rule did not let the push be an update; ``grant`` is what may be computed next,
    where that was asked for.
    """

    version: int
    clock: int
    lead: int
    staleness: int
    wait_s: float
    compute_s: float
    applied: bool = True
    grant: Grant | None = None


@dataclass(frozen=True)
class Meeting:
    """All have met: under these thresholds they go on, and these are all, by rank and generation."""

    thresholds: dict[str, int]
    members: tuple[tuple[int, int], ...]


class ParameterClient:
    """The connection of one worker.

    Args:
        endpoint: where the server is.
        credentials: of the run.
        rank: the worker's global rank.
        transport: ``"shm"``, ``"tcp"``, or ``"auto"``: shared memory on the server's host, TCP otherwise.
        check: called while waiting; raises to break off (a signal has come, say).
        anew: whether it joins a run that goes on, as ``rank`` if that is lost, or as a further worker (-1): then it
            waits until it can take part.

    Attributes:
        rank: the worker's, as the server knows it.
        generation: how many have been it, this one included.
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
        anew: bool = False,
    ) -> None:
        self._connection = Connection("parameter server", endpoint, credentials, rank, check)
        self._layout = Layout.from_message(endpoint.layout)
        self._wait_s = 0.0  # not yet reported
        self._compute_s = 0.0
        self._running_since: float | None = None
        self.last_release: Release | None = None
        try:
            self._link = self._join(endpoint, transport, anew)
        except BaseException:
            self._connection.drop()
            raise
        self.gradients = self._layout.views(self._link.gradients)
        self.weights = self._layout.views(self._link.weights)

    def _join(self, endpoint: Endpoint, transport: Transport, anew: bool) -> WorkerLink:
        same_host = memory.supported() and endpoint.host_id == memory.host_id()
        if transport == "shm" and not same_host:
            raise memory.SharedMemoryError(
                f"transport='shm', but rank {self._connection.rank} is not on the host of the parameter server "
                f"({endpoint.address}): write transport='auto' or 'tcp'"
            )
        shares = same_host and transport != "tcp"
        message = self._connection.join(shares, anew)
        self.rank, self.generation = self._connection.rank, message["generation"]
        if shares:
            try:
                return SharedWorkerLink(message["path"], message["nbytes"], message["token"])
            except memory.SharedMemoryError:  # another container of the same host
                if transport == "shm":
                    raise
                self._connection.send("unshare")
        return StreamWorkerLink(message["nbytes"])

    @property
    def failure(self) -> RunFailedError | None:
        """Why the run has failed, once this worker has been told."""
        return self._connection.failure

    @property
    def shared(self) -> bool:
        """Whether the buffers are shared memory."""
        return self._link.shared

    @property
    def buffer(self) -> Tensor:
        """The bytes behind both lists of tensors."""
        return self._link.buffer

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
        leases: Sequence[int] = (),
        asks: bool = False,
        commits: bool = True,
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
            leases: of the batches whose gradients these are, where batches are handed out.
            asks: whether to wait for the next ones too: they come with the OK.
            commits: whether these are trained then, or other pushes with their gradients may follow.

        Raises:
            RunFailedError: if the run has failed elsewhere.
            ServerLostError: if the server has ended.
        """
        self._stop_computing()
        compute_s = self._compute_s
        ranges = self._unsent([place for place, is_used in zip(places, used, strict=True) if is_used])
        started = time.monotonic()
        self._connection.send(
            "push",
            optimizer=optimizer,
            used=list(used),
            options=options,
            clip=None if clip is None else list(clip),
            whole=whole,
            leases=list(leases),
            asks=asks,
            commits=commits,
            nbytes=sum(end - start for start, end in ranges),
            **self._take_times(),
        )
        self._send_bytes(self._link.gradients, ranges)
        message = self._receive_weights("released")
        wait_s = time.monotonic() - started
        self._wait_s += wait_s
        self.last_release = Release(
            **{name: message[name] for name in ("version", "clock", "lead", "staleness", "applied")},
            wait_s=wait_s,
            compute_s=compute_s,
            grant=None if message["grant"] is None else Grant.of(message["grant"]),
        )
        self.start_computing()
        return self.last_release

    def request(
        self, leases: Sequence[int] = (), plan: Plan | None = None, kept: Sequence[int] = (), steps: int = 0
    ) -> Grant:
        """Wait for batches to compute, and pull the weights with them.

        Args:
            leases: of those that count as trained, and that no push has committed.
            plan: what there is until the next meeting, if this is the first request since the last.
            kept: leases of those whose gradients a later push will have.
            steps: how often optimizers have stepped in the batch that is over.

        Raises:
            RunFailedError: if the run has failed elsewhere, or other workers have another plan.
            ServerLostError: if the server has ended.
        """
        self._stop_computing()
        started = time.monotonic()
        self._connection.send(
            "request",
            leases=list(leases),
            plan=None if plan is None else astuple(plan),
            kept=list(kept),
            steps=steps,
        )
        message = self._receive_weights("granted")
        self._wait_s += time.monotonic() - started
        self.start_computing()
        return Grant.of(message["grant"])

    def meet(
        self, place: str, detail: str, pull: bool = True, timeout_s: float = math.inf, region: str = ""
    ) -> Meeting:
        """Wait until all workers are at ``place``.

        Args:
            place: a name that is the same on all workers.
            detail: what the error says besides if the names differ.
            pull: whether to pull the weights then; without it, the worker is taken to be amid a step.
            timeout_s: how long to wait.
            region: what is begun anew if a worker is lost in it: the places of others in it may differ then.

        Returns:
            The thresholds of the paradigm and who has met, the same on all workers.

        Raises:
            RunFailedError: if the run has failed elsewhere, or the workers are at different places.
            ServerLostError: if the server has ended, or ``timeout_s`` is over.
        """
        self._stop_computing()
        started = time.monotonic()
        self._connection.send("sync", place=place, detail=detail, region=region, pull=pull, **self._take_times())
        message = self._receive_weights("synced", deadline=started + timeout_s)
        self._wait_s += time.monotonic() - started
        if not pull:
            self.start_computing()
        ranks, generations = message["members"][::2], message["members"][1::2]
        return Meeting(message["thresholds"], tuple(zip(ranks, generations, strict=True)))

    def refresh(self) -> None:
        """Pull all weights of now, without waiting for anybody.

        Raises:
            RunFailedError: if the run has failed elsewhere.
            ServerLostError: if the server has ended.
        """
        started = time.monotonic()
        self._connection.send("pull")
        self._receive_weights("synced")
        self._wait_s += time.monotonic() - started

    def pull(self) -> None:
        """As :meth:`refresh`, also when the run has failed."""
        self._connection.ask("pull")
        self._receive_weights("synced", self._connection.patience(), failed_too=True)

    def tell_changes(self, places: Sequence[int]) -> None:
        """Let the server have the :attr:`weights` at ``places`` as they are here; for the only worker of a run."""
        ranges = self._unsent(places)
        if ranges:
            self._connection.send("change", places=list(places), nbytes=sum(end - start for start, end in ranges))
            self._send_bytes(self._link.weights, ranges)

    def set_thresholds(self, thresholds: Mapping[str, int]) -> None:
        """Change thresholds of the paradigm; whoever that lets go on gets its OK at once.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for an impossible value.
        """
        refusal = self._ask("thresholds", values=dict(thresholds))
        if refusal is not None:
            raise ValueError(refusal)

    # --- who joins anew ---------------------------------------------------------------------------------------------

    def deposit(self, state: bytes) -> None:
        """On rank 0: until all meet next, let who joins anew begin with ``state``."""
        for start in range(0, max(1, len(state)), _PART_BYTES):
            part = state[start : start + _PART_BYTES]
            self._connection.send("deposit", part=part, last=start + len(part) >= len(state))

    def deposited(self) -> bytes:
        """Return what this worker, which has joined anew, begins with."""
        state: Tensor = self._ask("deposited")
        return state.numpy().tobytes()

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

    def abort(self, kind: FailureKind, text: str) -> RunFailedError | None:
        """Tell the server, and through it every worker, that this one fails; return what had failed before."""
        return self._connection.abort(kind, text)

    def begin_to_end(self) -> None:
        """Wait no longer than 30 s for the answer to a question from now on."""
        self._connection.begin_to_end()

    def close(self, finished: bool) -> None:
        """End the connection, with a goodbye if this worker has finished or the run has failed.

        Without one, the server takes the worker for lost.
        """
        self._connection.close(finished)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _unsent(self, places: Sequence[int]) -> Ranges:
        return [] if self.shared else self._layout.ranges(places)

    def _send_bytes(self, buffer: Tensor, ranges: Ranges) -> None:
        self._connection.send_chunks(_bytes_of(buffer), ranges)

    def _receive_weights(self, kind: str, deadline: float | None = None, failed_too: bool = False) -> dict[str, Any]:
        message = self._connection.receive(kind, deadline, failed_too)
        self._receive_bytes(message["nbytes"], self._link.weights)
        return message

    def _ask(self, question: str, **fields: Any) -> Any:
        self._connection.ask(question, **fields)
        reply = self._connection.receive("reply", self._connection.patience(), failed_too=True)
        parcel = torch.empty(reply["size"], dtype=torch.uint8)
        self._receive_bytes(reply["nbytes"], parcel)
        return unpack(parcel, reply["head"])

    def _receive_bytes(self, nbytes: int, into: Tensor) -> None:
        while nbytes > 0:
            nbytes -= self._connection.receive("chunk", failed_too=True, data=_bytes_of(into))["nbytes"]
            if nbytes > 0:
                self._connection.send("more")

    # --- times ------------------------------------------------------------------------------------------------------

    def _stop_computing(self) -> None:
        if self._running_since is not None:
            self._compute_s += time.monotonic() - self._running_since
            self._running_since = None

    def _take_times(self) -> dict[str, float]:
        times = {"wait_s": self._wait_s, "compute_s": self._compute_s}
        self._wait_s = self._compute_s = 0.0
        return times


def _bytes_of(buffer: Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]
