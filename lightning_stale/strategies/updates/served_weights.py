"""Tell a parameter server what it serves: the weights and optimizers of a training that is about to start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stale.elastic import Elastic
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.apply import ApplyRule
from lightning_stale.parameter_server.client import Transport
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.recording.options import Recording
from lightning_stale.strategies.updates.update import Training, names_of, unique_parameters
from lightning_stale.transport import address, memory
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.layout import Layout


def serve_weights(
    process: ServerProcess,
    credentials: Credentials,
    training: Training,
    paradigm: Paradigm,
    transport: Transport,
    apply: ApplyRule,
    snapshot: Mapping[str, Any] | None,
    hands_out_batches: bool,
    elastic: Elastic | None,
    recording: Recording,
) -> Endpoint:
    """Let ``process`` serve, and return where it is.

    Args:
        process: the server's.
        credentials: of the run.
        training: with the initial weights, and the optimizers with the state to start from.
        paradigm: the gate.
        transport: of the workers, as in ``StaleSyncStrategy``.
        apply: how a gradient is used.
        snapshot: the clocks of a checkpoint.
        hands_out_batches: whether the workers ask for batches.
        elastic: what becomes of the run when workers are lost.
        recording: what is recorded of the run, and replayed.
    """
    topology, parameters = training.topology, unique_parameters(training.optimizers)
    layout = Layout.of(parameters)
    shares_memory = transport != "tcp" and memory.supported()
    nodes = topology.nodes if elastic is None else max(2, topology.nodes)  # further workers may come from anywhere
    host, reached_at = address.choose(training.main_address, nodes)
    port = process.serve(
        parameters,
        training.optimizers,
        paradigm,
        topology.world_size,
        credentials,
        host=host,
        folder=_choose_folder(2 * layout.nbytes * topology.ranks_per_node) if shares_memory else "",
        local_workers=topology.ranks_per_node if shares_memory else 0,
        snapshot=snapshot,
        apply=apply,
        hands_out_batches=hands_out_batches,
        elastic=elastic,
        names=names_of(training.module, parameters),
        recording=recording,
    )
    return Endpoint(
        address=f"tcp://{reached_at}:{port}",
        host_id=memory.host_id(),
        pid=process.pid,
        layout=layout.to_message(),
    )


def _choose_folder(nbytes: int) -> str:
    folder, warning = memory.choose_folder(nbytes)
    if warning is not None:
        rank_zero_warn(warning)
    return folder
