"""A connect or a start that fails is an error, and over with: a sweep or a notebook goes on in the same process."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from lightning_stale import ASP
from lightning_stale.coordinator import connection
from lightning_stale.coordinator.connection import ServerLostError
from lightning_stale.coordinator.process import ServerStartError
from lightning_stale.parameter_server.client import ParameterClient
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.layout import Layout
from tests.integration.harness import free_port, run_workers

CREDENTIALS = Credentials.derive("s" * 32, "run")


def connect(address: str, check: Any = lambda: None) -> None:
    endpoint = Endpoint(address, "another host", 7, Layout.of([torch.zeros(3)]).to_message())
    ParameterClient(endpoint, CREDENTIALS, 0, "auto", check)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail_to_connect(rank: int) -> float:
    """Return the seconds that failing took, with the garbage collected: there pyzmq blocks on sockets left open."""
    connection.CONNECT_TIMEOUT_S = 0.5
    before = open_sockets()
    nobody = f"tcp://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(ServerLostError, match="has waited in vain for the parameter server"):
        connect(nobody)
    gc.collect()
    with pytest.raises(KeyboardInterrupt):
        connect(nobody, interrupt)
    gc.collect()
    with pytest.raises(zmq.ZMQError):
        connect("tcp://no port")
    gc.collect()
    assert open_sockets() == before
    return time.monotonic() - started


def open_sockets() -> set[str]:
    return {link for link in map(read_link, Path("/proc/self/fd").iterdir()) if "socket" in link}


def read_link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # that of the listing itself
        return ""


def fail_to_start(rank: int) -> int | None:
    """Return the exit status of a server that cannot listen where it should."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    server = ServerProcess()
    with pytest.raises(ServerStartError, match="the parameter server did not start"):
        server.serve([parameter], [torch.optim.SGD([parameter])], ASP(), 1, CREDENTIALS, "192.0.2.1", "")
    return server._process.poll()


def test_a_failed_connect_leaves_nothing_that_blocks(tmp_path: Path) -> None:
    run_workers(fail_to_connect, 1, tmp_path, timeout=60)


def test_a_server_that_cannot_start_ends(tmp_path: Path) -> None:
    assert run_workers(fail_to_start, 1, tmp_path, timeout=60) == [1]


LATE_OPTIMIZER = """
import atexit, os, pathlib, torch
FOLDER = pathlib.Path(__file__).parent
class Late(torch.optim.SGD):
    def step(self, closure=None):
        self.log = open(FOLDER / "log", "w")  # and nobody closes it
        self.log.write("a step")
        atexit.register((FOLDER / "ended").touch)
        return super().step(closure)
"""


def add_a_folder_late(rank: int, folder: Path) -> str:
    """Return what the server holds of an optimizer whose folder came on the path when the server had been started."""
    (folder / "late_optimizers.py").write_text(LATE_OPTIMIZER)
    server = ServerProcess()
    sys.path.append(str(folder))  # as a LightningModule may do it in setup()
    kind: Any = importlib.import_module("late_optimizers").Late
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = kind([parameter], lr=0.1, momentum=0.5)
    port = server.serve([parameter], [optimizer], ASP(), 1, CREDENTIALS, "127.0.0.1", "")
    layout = Layout.of([parameter]).to_message()
    client = ParameterClient(
        Endpoint(f"tcp://127.0.0.1:{port}", "another host", server.pid, layout), CREDENTIALS, 0, "tcp"
    )
    state = client.optimizer_state(0)
    client.meet("the start", "")
    client.push(0, [0], [True], read_options(optimizer), None)
    client.close(finished=True)
    server.stop()
    assert server._process.poll() == 0
    assert (folder / "log").read_text() == "a step"
    assert (folder / "ended").exists()
    return repr(state)


def test_the_server_finds_what_has_come_on_the_path_and_loses_nothing_at_its_end(tmp_path: Path) -> None:
    assert run_workers(add_a_folder_late, 1, tmp_path, tmp_path, timeout=60) == ["{'state': {}, 'param_groups': [{}]}"]
