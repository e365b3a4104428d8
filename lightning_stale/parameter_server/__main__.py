"""The server process: ``python -m lightning_stale.parameter_server PARENT``, started by global rank 0, ended with it.

Standard input first carries the job (:class:`~lightning_stale.parameter_server.process.Job`, pickled by rank 0), the
weights and the state of the optimizers, and then stays open as a lifeline: when it closes, rank 0 is gone. Standard
output carries an empty line for each segment of shared memory that has been made, and then the port, or why there is
none.
"""

from __future__ import annotations

import gc
import os
import sys

from lightning_stale.lifeline import serve_rank_0

_PARENT = int(sys.argv[1])
_begin_to_serve = serve_rank_0(_PARENT)
gc.disable()  # until all is imported: it would walk through that dozens of times, and find nothing

import logging
import pickle

import torch
from torch import Tensor

from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.leases import EpochLeases
from lightning_stale.coordinator.service import Service
from lightning_stale.events import Recorder
from lightning_stale.events.stale_sync import StaleSyncCounts
from lightning_stale.parameter_server.inspector import Inspector
from lightning_stale.parameter_server.pickling import compute_on_cpu, load_optimizers
from lightning_stale.parameter_server.process import Job
from lightning_stale.parameter_server.shard import Shard
from lightning_stale.parameter_server.store import ParameterStore
from lightning_stale.private import of_dynamo, of_python
from lightning_stale.transport.memory import SharedMemoryError
from lightning_stale.transport.sockets import ServerSocket


def main() -> None:
    """Read the job, serve, and end."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's optimizer prints is no answer
    _warm_up()
    try:
        sys.path = pickle.load(sys.stdin.buffer)  # as rank 0 has it now: the job's classes may be anywhere on it
        job: Job = pickle.load(sys.stdin.buffer)
    except EOFError:  # rank 0 has changed its mind, or failed
        return
    torch.set_num_threads(job.threads)
    layout = job.layout
    weights = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for slot in layout.slots:
        _read_into(weights[slot.offset : slot.offset + slot.nbytes])
    store = ParameterStore(weights, layout, job.apply)
    buffers = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in job.buffers]
    for buffer in buffers:
        _read_into(buffer)
    optimizers = load_optimizers(job.optimizers, store.parameters, buffers)
    del buffers
    compute_on_cpu(optimizers)
    store.set_optimizers(optimizers)
    job.apply.begin(job.world_size, len(optimizers))
    elastic = job.elastic
    patience_s = None if elastic is None else elastic.patience_s
    socket = ServerSocket(job.host, job.server_keys, job.worker_key, patience_s)
    counts = StaleSyncCounts(job.world_size, job.paradigm.thresholds)
    recorder = Recorder(counts)
    leases = EpochLeases(job.world_size, job.paradigm.allows) if job.hands_out_batches else None
    coordinator = Coordinator(
        job.world_size,
        job.paradigm,
        leases=leases,
        on_loss="end" if elastic is None else "go on",
        least=1 if elastic is None else elastic.min_workers,
        record=recorder.record,
    )
    turns = job.recording.begin(job.header, recorder, lambda worker: service.lose_as_recorded(worker))
    service = Service(socket, coordinator, name="parameter server", turns=turns)
    grows, inspector = elastic is not None, Inspector.of(job.recording, job.names, recorder.record)
    shard = Shard(service, store, layout, job.world_size, job.folder, counts, recorder.record, grows, inspector)
    if job.snapshot is not None:
        shard.resume(job.snapshot)
    try:
        shard.prepare_segments(job.local_workers, report=lambda: print(file=answer, flush=True))
    except SharedMemoryError as error:
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=answer, flush=True)
        raise
    del job
    _begin_to_serve()
    print(socket.port, file=answer, flush=True)
    answer.close()
    try:
        service.run(lifeline=sys.stdin.fileno(), orphaned=lambda: os.getppid() != _PARENT)
    finally:
        socket.close()


def _read_into(buffer: Tensor) -> None:
    memory = memoryview(buffer.numpy())  # type: ignore[arg-type]
    while len(memory) > 0:
        count = sys.stdin.buffer.readinto(memory)  # type: ignore[union-attr]
        if not count:
            raise EOFError("rank 0 has ended amid the weights")
        memory = memory[count:]


def _warm_up() -> None:
    """Have torch import what the first step of any optimizer needs, while rank 0 still sets up."""
    of_dynamo.postpone()
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0).step()
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    main()
    of_python.exit_at_once()  # rank 0 waits for this end
