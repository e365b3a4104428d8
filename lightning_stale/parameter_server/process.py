"""The process of the parameter server: what rank 0 tells it to begin with."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.coordinator.process import ChildProcess
from lightning_stale.elastic import Elastic
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.apply import ApplyRule, Plain
from lightning_stale.parameter_server.dense import memory_of
from lightning_stale.parameter_server.fingerprints import checksum
from lightning_stale.parameter_server.pickling import dump_optimizers
from lightning_stale.recording.options import Recording
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.sockets import KeyPair


@dataclass
class Job:
    """All that the server process needs to know."""

    layout: Layout
    optimizers: bytes
    buffers: list[int]  # bytes of each of those that follow the weights, which follow the job
    paradigm: Paradigm
    apply: ApplyRule
    world_size: int
    host: str
    folder: str
    local_workers: int
    threads: int
    server_keys: KeyPair
    worker_key: str
    hands_out_batches: bool
    snapshot: Mapping[str, Any] | None
    elastic: Elastic | None
    names: list[str]
    recording: Recording
    header: dict[str, Any]


class ServerProcess(ChildProcess):
    """The parameter server of one ``fit``, as seen by global rank 0."""

    def __init__(self) -> None:
        super().__init__(
            "lightning_stale.parameter_server",
            "parameter server",
            "; an optimizer or apply rule whose class cannot be imported outside of this script's folder is the usual "
            "cause.",
        )

    def serve(
        self,
        parameters: Sequence[Tensor],
        optimizers: Sequence[Optimizer],
        paradigm: Paradigm,
        world_size: int,
        credentials: Credentials,
        host: str,
        folder: str,
        local_workers: int = 0,
        snapshot: Mapping[str, Any] | None = None,
        apply: ApplyRule | None = None,
        hands_out_batches: bool = False,
        elastic: Elastic | None = None,
        names: Sequence[str] | None = None,
        recording: Recording | None = None,
    ) -> int:
        """Send the job, and return the port once the server listens.

        Args:
            parameters: the initial weights.
            optimizers: the user's, over ``parameters``, with the state to start from.
            paradigm: the gate.
            world_size: the number of workers.
            credentials: of the run.
            host: the address to listen on.
            folder: where shared memory is made.
            local_workers: those that share memory with the server; for others it is made when they connect.
            snapshot: the clocks of a checkpoint, and what the apply rule remembers.
            apply: how a push is applied; ``None``: as it is.
            hands_out_batches: whether the workers ask for batches.
            elastic: what becomes of the run when workers are lost; ``None``: it ends.
            names: of the parameters.
            recording: what is recorded of the run, and replayed; ``None``: nothing.

        Raises:
            ReplayError: if the run cannot be the one that is to be replayed.
            OptimizerPicklingError: if an optimizer cannot be sent.
            ServerStartError: if the process does not come up.
        """
        buffers: list[Tensor] = []
        dumped = dump_optimizers(optimizers, parameters, buffers)
        names = [f"parameter {place}" for place in range(len(parameters))] if names is None else list(names)
        recording = recording or Recording()
        header = {
            "strategy": "StaleSyncStrategy",
            "fit": recording.fit,
            "paradigm": repr(paradigm),
            "apply": repr(apply or Plain()),
            "world_size": world_size,
            "on_demand": hands_out_batches,
            "elastic": None if elastic is None else repr(elastic),
            "updates": 0 if snapshot is None else snapshot["updates"],
            "torch": torch.__version__,
        }
        if recording.looks_at_pushes:
            header["weights"] = {name: checksum(p) for name, p in zip(names, parameters, strict=True)}
        recording.check(header)
        job = Job(
            layout=Layout.of(parameters),
            optimizers=dumped,
            buffers=[buffer.numel() for buffer in buffers],
            paradigm=paradigm,
            apply=apply or Plain(),
            world_size=world_size,
            host=host,
            folder=folder,
            local_workers=local_workers,
            threads=torch.get_num_threads(),
            server_keys=credentials.server,
            worker_key=credentials.worker.public,
            hands_out_batches=hands_out_batches,
            snapshot=snapshot,
            elastic=elastic,
            names=names,
            recording=recording,
            header=header,
        )
        self.tell(pickle.dumps(sys.path), cloudpickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))
        for memory in itertools.chain(map(memory_of, parameters), buffers):
            self.tell(memoryview(memory.numpy()))  # type: ignore[arg-type]
        return self.await_port()
