"""A process ends with the one that has started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_stale.lifeline import GRACE_S

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-X", "lightning_stale_server"]

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-X", "lightning_stale_server", "-c", sys.argv[1]],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip(), flush=True)
if sys.argv[2] == "lets go":
    child.stdin.close()
if sys.argv[2] != "ends":
    time.sleep(3600)
"""
CHILD = """
import os, sys, time
from lightning_stale.lifeline import end_with
end_with(os.getppid(), {arguments})
print(os.getpid(), flush=True)
while True:
    time.sleep(0.1)
"""


def start(arguments: str, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PYTHON, "-c", PARENT, CHILD.format(arguments=arguments), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for_the_end_of(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("arguments", ["grace_s=0.0", "sys.stdin.fileno(), grace_s=0.1"], ids=["alone", "lifeline"])
def test_a_process_ends_with_its_parent(arguments: str) -> None:
    parent = start(arguments, "ends")
    said, errors = parent.communicate(timeout=60)  # the end of stderr, which the child has too, is the child's end
    wait_for_the_end_of(int(said))
    assert ("rank 0 has ended" in errors) == ("stdin" in arguments), errors
    assert ('File "<string>", line' in errors) == ("stdin" in arguments), "where it was"


def test_a_process_ends_when_its_parent_lets_go_of_it() -> None:
    parent = start("sys.stdin.fileno(), grace_s=0.1", "lets go")
    try:
        assert parent.stdout is not None
        wait_for_the_end_of(int(parent.stdout.readline()))
        assert parent.poll() is None
    finally:
        parent.kill()
        parent.communicate()


def test_the_main_thread_has_time_to_tell_the_workers_and_the_kernel_waits_longer() -> None:
    assert 3.0 <= GRACE_S < 16
