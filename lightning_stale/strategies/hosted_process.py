"""The process beside global rank 0 that all ranks connect to: started early, introduced to all, ended with the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning_stale.coordinator.process import ChildProcess, CoordinatorProcess
from lightning_stale.private import of_torch
from lightning_stale.recording.options import Recording
from lightning_stale.topology import Topology
from lightning_stale.transport import address, memory
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.introduction import Introduction

ProcessT = TypeVar("ProcessT", bound=ChildProcess)


class HostedProcess(Generic[ProcessT]):
    """On global rank 0, the process; on all ranks, how they learn of it.

    Args:
        start: starts the process, which imports what it needs before it is told what to serve.
        name: of it, in errors.
        needs_secret: whether the ranks need one to reach it, or, as torch's store, who can may.
    """

    def __init__(self, start: Callable[[], ProcessT], name: str, needs_secret: bool) -> None:
        self.needs_secret = needs_secret
        self.invites = False
        """Whether others may come as long as it runs."""
        self._start, self._name = start, name
        self._process: ProcessT | None = None
        self._introduction: Introduction | None = None  # while the ranks connect

    def prepare(self) -> None:
        """On rank 0: start the process, if there is none yet."""
        if self._process is None:
            self._process = self._start()

    def introduce(
        self,
        run: str,
        rank: int,
        topology: Topology,
        serve: Callable[[ProcessT, Credentials], Endpoint],
        check: Callable[[], None],
    ) -> tuple[Endpoint, Credentials]:
        """Return where the process is; on rank 0, once ``serve`` has told it what to serve.

        Args:
            run: a name that no other run has, the same on all ranks.
            rank: this one.
            topology: of the run.
            serve: tells the process, and returns where it is.
            check: called while waiting; raises to break off.
        """
        self._introduction = self._introduce(run, rank, others=topology.world_size - 1)
        if rank > 0:
            return self._introduction.accept(check)

        def offer(credentials: Credentials) -> Endpoint:
            self.prepare()
            assert self._process is not None
            return serve(self._process, credentials)

        return self._introduction.offer(offer)

    def learn(self, run: str, rank: int, check: Callable[[], None]) -> tuple[Endpoint, Credentials]:
        """Return where the process is, to one who comes while the run goes on.

        Args:
            run: its name.
            rank: this one.
            check: called while waiting; raises to break off.
        """
        return self._introduce(run, rank, others=0).accept(check)

    def _introduce(self, run: str, rank: int, others: int) -> Introduction:
        return Introduction(
            of_torch.shared_store(),
            run,
            rank,
            others=others,
            name=self._name,
            open_to_all=not self.needs_secret,
            invites=self.invites,
        )

    @property
    def secret_file(self) -> Path | None:
        """On rank 0: where the secret is that lets others in, if so."""
        return None if self._introduction is None else self._introduction.secret_file

    def end_introduction(self) -> None:
        """All have connected, or nobody will any more; where others are invited, they may as long as it runs."""
        if self._introduction is not None and not self.invites:
            self._introduction.close()
            self._introduction = None

    def stop(self, grace_s: float | None = None) -> None:
        """On rank 0: end the process; it has ``grace_s`` to end by itself, as it does when all ranks have left it."""
        if self._process is not None:
            self._process.stop(grace_s)
            self._process = None
        self.invites = False
        self.end_introduction()


def serve_coordinator(
    process: CoordinatorProcess,
    credentials: Credentials,
    world_size: int,
    main_address: str,
    nodes: int,
    hands_out_batches: bool = False,
    recording: Recording | None = None,
    header: Mapping[str, Any] | None = None,
) -> Endpoint:
    """Let ``process`` coordinate ranks, and return where it is.

    Args:
        process: the coordinator's.
        credentials: of the run.
        world_size: the number of ranks.
        main_address: of rank 0's host.
        nodes: the number of hosts.
        hands_out_batches: whether the ranks ask for batches.
        recording: what is recorded of the run, and replayed.
        header: of the record.
    """
    host, reached_at = address.choose(main_address, nodes)
    port = process.serve(world_size, host, credentials, hands_out_batches, recording, header)
    return Endpoint(address=f"tcp://{reached_at}:{port}", host_id=memory.host_id(), pid=process.pid, layout=[])
