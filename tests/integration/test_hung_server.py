"""A parameter server that hangs, in the user's optimizer or before, ends with rank 0 and keeps nobody for ever."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stale.coordinator import connection
from tests.integration.harness import ROOT, workers
from tests.integration.models import Regression, loader, trainer


class Hanging(torch.optim.SGD):
    """Hangs in its third step, in Python or in C with the interpreter lock."""

    steps = 0

    def __init__(self, parameters: Any, folder: Path, locked: bool) -> None:
        super().__init__(parameters, lr=0.01)
        self.folder, self.locked = folder, locked

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 3:
            (self.folder / "hangs").touch()
            if self.locked:
                ctypes.PyDLL(None).sleep(3600)
            while True:
                time.sleep(0.1)
        return super().step(closure)


class WithHanging(Regression):
    def __init__(self, folder: Path, locked: bool) -> None:
        super().__init__()
        self.folder, self.locked = folder, locked

    def configure_optimizers(self) -> Any:
        return Hanging(self.parameters(), self.folder, self.locked)


def train(rank: int, folder: Path, locked: bool) -> None:
    connection.QUESTION_TIMEOUT_S = 2.0
    trainer(2, "asp", max_epochs=-1).fit(WithHanging(folder, locked), loader())


@pytest.mark.parametrize("locked", [False, True], ids=["in Python", "with the interpreter lock"])
def test_the_server_ends_when_rank_0_is_killed_and_the_others_hear_of_it(locked: bool, tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, tmp_path, locked) as group:
        group.wait_for("hangs")
        server = group.server()
        os.kill(group.pid(0), signal.SIGKILL)
        server.wait(timeout=60)  # on its own: the harness has not come to what is left yet
        ended = group.join(timeout=30)
    assert ended[0].exitcode == -signal.SIGKILL
    assert ended[1].exitcode == 1
    assert "rank 1 has lost the parameter server" in ended[1].error


def test_an_interrupted_rank_0_does_not_wait_for_it(tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, tmp_path, False) as group:
        group.wait_for("hangs")
        for rank in (0, 1):
            os.kill(group.pid(rank), signal.SIGINT)
        ended = group.join(timeout=60)
    assert [worker.exitcode for worker in ended] == [1, 1]
    assert all("KeyboardInterrupt" in worker.error for worker in ended)


STARTER = """
import subprocess, sys, time
server = subprocess.Popen([sys.executable, "-X", "lightning_stale_server", "-c", sys.argv[1]],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(server.stdout.readline().decode().strip(), flush=True)
time.sleep(3600)
"""

SERVER = """
import os, sys, time
from lightning_stale.lifeline import end_with
end_with(os.getppid(), sys.stdin.fileno(), grace_s=0.1)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


def test_a_process_that_has_not_come_to_serve_ends_with_its_parent() -> None:
    """It may still import torch, which takes long on a busy machine."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert starter.stdout is not None
    assert starter.stdout.readline() == "ready\n"
    starter.kill()
    _, said = starter.communicate(timeout=60)  # the end of stderr, which the server has too, is the server's end
    assert "rank 0 has ended" in said
    assert 'File "<string>", line' in said, "where it was"
