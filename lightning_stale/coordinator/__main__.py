"""The coordinator's process: ``python -m lightning_stale.coordinator PARENT``, started by rank 0, ended with it.

Standard input first carries the job (:class:`~lightning_stale.coordinator.process.Job`, a line of JSON), and then stays
open as a lifeline: when it closes, rank 0 is gone. Standard output carries the port.
"""

from __future__ import annotations

import os
import sys

from lightning_stale.lifeline import serve_rank_0

_PARENT = int(sys.argv[1])
_begin_to_serve = serve_rank_0(_PARENT)

import json
import logging

from lightning_stale.coordinator.coordinator import Coordinator
from lightning_stale.coordinator.process import Job
from lightning_stale.coordinator.round_leases import RoundLeases
from lightning_stale.coordinator.service import Service
from lightning_stale.events import Recorder
from lightning_stale.recording.turns import ReplayError
from lightning_stale.transport.sockets import ServerSocket


def main() -> None:
    """Read the job, serve, and end."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    line = sys.stdin.buffer.readline()
    if not line:  # rank 0 has changed its mind, or failed
        return
    job = Job(**json.loads(line))
    socket = ServerSocket(job.host, job.server_keys, job.worker_key)
    try:
        _begin_to_serve()
        print(socket.port, flush=True)
        leases = RoundLeases(job.members) if job.hands_out_batches else None
        recorder = Recorder()
        turns = job.recording.begin(job.header, recorder, lose=_refuse_to)
        service = Service(socket, Coordinator(job.members, leases=leases, record=recorder.record), turns=turns)
        service.run(lifeline=sys.stdin.fileno(), orphaned=lambda: os.getppid() != _PARENT)
    finally:
        socket.close()


def _refuse_to(worker: int) -> None:
    raise ReplayError(f"the record that is replayed ends here, where rank {worker} was lost")


if __name__ == "__main__":
    main()
