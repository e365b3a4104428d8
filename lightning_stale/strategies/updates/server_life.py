"""The life of a parameter server: started early, told what to serve, introduced to all ranks, and ended with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.client import Transport
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.private import of_torch
from lightning_stale.strategies.updates.update import Training, unique_parameters
from lightning_stale.transport import address, memory
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.introduction import Introduction
from lightning_stale.transport.layout import Layout


class ServerLife:
    """On global rank 0, the server's process; on all ranks, how they learn of it.

    Args:
        transport: of the workers, as in ``StaleSyncStrategy``.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._process: ServerProcess | None = None
        self._introduction: Introduction | None = None  # while the ranks connect

    def prepare(self) -> None:
        """On rank 0: let the process import what it needs, while nobody knows yet what it will serve."""
        if self._process is None:
            self._process = ServerProcess()

    def introduce(
        self, training: Training, paradigm: Paradigm, snapshot: Mapping[str, Any] | None
    ) -> tuple[Endpoint, Credentials]:
        """Return where the server is; on rank 0, once it serves.

        Args:
            training: with the weights, and the optimizers with their state.
            paradigm: the gate.
            snapshot: what it goes on from.
        """
        others = training.topology.world_size - 1
        self._introduction = Introduction(of_torch.rendezvous_store(), training.run, training.rank, others)
        if training.rank == 0:
            return self._introduction.offer(lambda credentials: self._serve(training, paradigm, snapshot, credentials))
        return self._introduction.accept(training.check_signals)

    def end_introduction(self) -> None:
        """All have connected, or nobody will any more."""
        if self._introduction is not None:
            self._introduction.close()
            self._introduction = None

    def stop(self, grace_s: float | None = None) -> None:
        """On rank 0: end the process; it has ``grace_s`` to end by itself, as it does when no worker is left."""
        if self._process is not None:
            self._process.stop(grace_s)
            self._process = None

    def _serve(
        self, training: Training, paradigm: Paradigm, snapshot: Mapping[str, Any] | None, credentials: Credentials
    ) -> Endpoint:
        topology, optimizers = training.topology, training.optimizers
        layout = Layout.of(unique_parameters(optimizers))
        host, reached_at = address.choose(training.main_address, topology.nodes)
        self.prepare()  # the second training of one fit, as LearningRateFinder does it, has a server of its own
        assert self._process is not None
        port = self._process.serve(
            unique_parameters(optimizers),
            optimizers,
            paradigm,
            topology.world_size,
            credentials,
            host=host,
            folder=self._choose_folder(layout, topology.ranks_per_node),
            local_workers=topology.ranks_per_node if self._shares_memory() else 0,
            snapshot=snapshot,
        )
        return Endpoint(
            address=f"tcp://{reached_at}:{port}",
            host_id=memory.host_id(),
            pid=self._process.pid,
            layout=layout.to_message(),
        )

    def _shares_memory(self) -> bool:
        return self._transport != "tcp" and memory.supported()

    def _choose_folder(self, layout: Layout, local_workers: int) -> str:
        if not self._shares_memory():
            return ""
        folder, warning = memory.choose_folder(2 * layout.nbytes * local_workers)
        if warning is not None:
            rank_zero_warn(warning)
        return folder
