"""A rank's side of a coordinator that has nothing beside it: who has failed, where all meet, who gets which batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from lightning_stale.coordinator.connection import Connection, ServerLostError
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.failures import FailureKind, RunFailedError
from lightning_stale.transport import wire
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint

_PAUSE_S = 0.05
_PINGS = 8  # of which the fastest says how far clocks are apart
_BLAME_S = wire.HEARTBEAT_TIMEOUT_MS / 1_000 + 5.0
"""A host that has vanished is known to be gone after a heartbeat's timeout; a process that has ended, at once."""


class Control:
    """One rank's connection to the coordinator of a run.

    Args:
        endpoint: where it is.
        credentials: of the run.
        rank: this one.
        check: called while waiting; raises to break off (a signal has come, say).
    """

    def __init__(
        self, endpoint: Endpoint, credentials: Credentials, rank: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._check_here, self._process = check, endpoint.pid
        self._connection = Connection("coordinator", endpoint, credentials, rank, check)
        try:
            self._connection.join()
        except BaseException:
            self._connection.drop()
            raise

    @property
    def failure(self) -> RunFailedError | None:
        """Why the run has failed, as far as this rank has been told."""
        return self._connection.failure

    def check(self, fresh: bool = False) -> None:
        """Raise if a rank has failed, or is gone; cheap enough for every batch.

        Args:
            fresh: wait for the coordinator's word, and do not rely on what has come from it by itself.

        Raises:
            RunFailedError: says which, and why.
        """
        self._check_here()
        try:
            if fresh and self.failure is None:
                self._connection.send("ping")
                self._connection.receive("pong", others="keep")
            else:
                self._connection.look()
        except ServerLostError as error:
            raise self._gone() from error
        if self.failure is not None:
            raise self.failure

    def clock_offset_s(self) -> float:
        """Return what is to be added to this process's clock to have the coordinator's, as far as a message is fast."""
        offsets = []
        for _ in range(_PINGS):
            asked = time.monotonic()
            self._connection.send("ping")
            now = self._connection.receive("pong", others="keep")["now"]
            answered = time.monotonic()
            offsets.append((answered - asked, now - (asked + answered) / 2))
        return float(min(offsets)[1])

    def blame(self) -> None:
        """After a connection has broken, find out whose.

        Raises:
            RunFailedError: says which, and why; nothing is raised if nobody is found to have failed.
        """
        deadline = time.monotonic() + _BLAME_S
        while time.monotonic() < deadline:
            self.check(fresh=True)
            time.sleep(_PAUSE_S)

    def come_to(self, place: str, detail: str = "", region: str = "") -> None:
        """Let the others know that this rank's next meeting is at ``place``; do not wait for them yet."""
        self._connection.send("sync", place=place, detail=detail, region=region, pull=False, wait_s=0.0, compute_s=0.0)

    def await_others(self) -> None:
        """Wait until all ranks have come to the place of :meth:`come_to`.

        Raises:
            RunFailedError: if a rank has failed, or they are at different places.
        """
        try:
            self._connection.receive("synced")
        except ServerLostError as error:
            raise self._gone() from error

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        """Come to ``place``, in ``region``, and wait until all others have.

        Raises:
            RunFailedError: as :meth:`await_others`.
        """
        self.come_to(place, detail, region)
        self.await_others()

    def request(self, leases: Sequence[int], plan: Plan | None = None, kept: Sequence[int] = ()) -> Grant:
        """Wait for batches to compute.

        Args:
            leases: of those whose changes have been averaged by now.
            plan: what there is until the next meeting, if this is the first request since the last.
            kept: leases of those that are trained here, and not averaged yet.

        Raises:
            RunFailedError: if a rank has failed, or others have another plan.
        """
        values = None if plan is None else astuple(plan)
        self._connection.send("request", leases=list(leases), plan=values, kept=list(kept), steps=0)
        try:
            return Grant.of(self._connection.receive("granted")["grant"])
        except ServerLostError as error:
            raise self._gone() from error

    def trained(self) -> dict[str, Any]:
        """Return which batches are committed, as ``Leases.state_dict()`` does; also when the run has failed."""
        self._connection.ask("progress")
        answer = self._connection.receive("trained", self._connection.patience(), failed_too=True, others="keep")
        leases: dict[str, Any] = answer["leases"]
        return leases

    def fail(self, kind: FailureKind, text: str) -> RunFailedError | None:
        """Tell all others why this rank ends; return what had failed before.

        Args:
            kind: of the failure.
            text: what follows "rank 1 ".
        """
        return self._connection.abort(kind, text)

    def close(self, finished: bool) -> None:
        """End the connection; a rank that has not finished is lost to the others, unless the run has failed."""
        self._connection.close(finished)

    def _gone(self) -> RunFailedError:
        return RunFailedError(
            "error",
            f"rank 0, or the coordinator beside it (process {self._process}), at which all ranks meet, is gone: it was "
            "killed, or hangs",
        )
