"""Start the server process, and end it."""

from __future__ import annotations

import itertools
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import cloudpickle
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.pickling import dump_optimizers, memory_of
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.sockets import KeyPair

START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 3.0
SERVER_OPTION = "lightning_stale_server"
"""``python -X lightning_stale_server`` marks the server process: it needs torch, and not all of lightning."""


class ServerStartError(RuntimeError):
    """The parameter server could not be started."""


@dataclass
class Job:
    """All that the server process needs to know."""

    layout: Layout
    optimizers: bytes
    buffers: list[int]  # bytes of each of those that follow the weights, which follow the job
    paradigm: Paradigm
    world_size: int
    host: str
    folder: str
    local_workers: int
    threads: int
    server_keys: KeyPair
    worker_key: str
    snapshot: Mapping[str, Any] | None


class ServerProcess:
    """The parameter server of one ``fit``, as seen by global rank 0.

    The process starts to import torch at once, and to serve when :meth:`serve` tells it what.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-X", SERVER_OPTION, "-m", "lightning_stale.parameter_server", str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._serving = False
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

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
            snapshot: the clocks of a checkpoint.

        Raises:
            OptimizerPicklingError: if an optimizer cannot be sent.
            ServerStartError: if the process does not come up.
        """
        buffers: list[Tensor] = []
        dumped = dump_optimizers(optimizers, parameters, buffers)
        job = Job(
            layout=Layout.of(parameters),
            optimizers=dumped,
            buffers=[buffer.numel() for buffer in buffers],
            paradigm=paradigm,
            world_size=world_size,
            host=host,
            folder=folder,
            local_workers=local_workers,
            threads=torch.get_num_threads(),
            server_keys=credentials.server,
            worker_key=credentials.worker.public,
            snapshot=snapshot,
        )
        try:
            self._stdin.write(cloudpickle.dumps(job, protocol=pickle.HIGHEST_PROTOCOL))
            for memory in itertools.chain(map(memory_of, parameters), buffers):
                self._stdin.write(memoryview(memory.numpy()))  # type: ignore[arg-type]
            self._stdin.flush()
            port = self._read_port()
            self._serving = True
            return port
        except (OSError, ValueError) as error:
            self.stop(grace_s=0.0)
            raise ServerStartError(
                f"the parameter server did not start (exit code {self._process.returncode}): {error or 'no answer'}. "
                "What it printed stands above; an optimizer class that cannot be imported outside of this script's "
                "folder is the usual cause."
            ) from error

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def stop(self, grace_s: float | None = None) -> None:
        """End the server: give it ``grace_s`` to end by itself, as it does when no worker is left, then make it."""
        if self._serving:
            self._wait(grace_s)
        self._close(self._process.stdin)  # the lifeline
        if not self._wait(_STOP_TIMEOUT_S):
            self._process.kill()
            self._process.wait()
        self._close(self._process.stdout)

    def _wait(self, timeout_s: float | None) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read_port(self) -> int:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if select.select([stdout], [], [], 1.0)[0]:
                line = stdout.readline()
                if line != b"\n":
                    if not line.strip().isdigit():
                        raise OSError(line.decode().strip())
                    return int(line)
                deadline = time.monotonic() + START_TIMEOUT_S  # it gets on
        raise OSError(f"no answer within {START_TIMEOUT_S:.0f} s")

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # the other end is gone
                pass
