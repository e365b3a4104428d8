"""A process ends with the one that has started it."""

from __future__ import annotations

import os
import signal
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


def wait_for_the_end_of(pid: int, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
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


@pytest.mark.parametrize("stops", [False, True])
def test_one_that_need_not_end_with_its_parent_does_not(stops: bool, tmp_path: Path) -> None:
    child = start(f"grace_s=0.2, says='too late', stops=lambda: {stops}", "ends")
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    if stops:
        child.wait(timeout=60)
        with pytest.raises(AssertionError):
            wait_for_the_end_of(pid, timeout=2.0)
        os.kill(pid, signal.SIGKILL)
    _, errors = child.communicate(timeout=60)
    wait_for_the_end_of(pid)
    assert ("ERROR: too late" in errors) != stops


@pytest.mark.parametrize("how", ["closed", "full"])
def test_it_ends_though_nobody_reads_what_it_says(how: str, tmp_path: Path) -> None:
    """Standard error is a pipe without a reader, or one that its reader leaves full."""
    (tmp_path / "pid").touch()
    child = f"""
import os, sys
from lightning_stale.lifeline import end_with
end_with(os.getppid(), sys.stdin.fileno(), grace_s=0.1)
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
print("there", flush=True)
if {how!r} == "full":
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(4096))
    except BlockingIOError:
        os.set_blocking(2, True)
while True:
    pass
"""
    reader, writer = os.pipe()
    parent = subprocess.Popen(
        [*PYTHON, "-c", PARENT, child, "stays"],
        stdout=subprocess.PIPE,
        stderr=writer,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"there\n"
    if how == "closed":
        os.close(reader)
    parent.kill()
    parent.communicate(timeout=60)
    wait_for_the_end_of(int((tmp_path / "pid").read_text()))
    if how == "full":
        os.close(reader)


def test_one_that_does_not_serve_yet_ends_at_once_and_says_nothing() -> None:
    """Unlike one that serves, which has others to tell: here each would stay for ever, if it were not ended."""
    child = "\n".join(
        (
            "import os, sys, time",
            "from lightning_stale import lifeline",
            "lifeline.GRACE_S = 3600.0",
            "lifeline.serve_rank_0(os.getppid())",
            "print(os.getpid(), flush=True)",
            "time.sleep(3600)",
        )
    )
    parent = subprocess.Popen(
        [*PYTHON, "-c", PARENT, child, "ends"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said, errors = parent.communicate(timeout=60)
    wait_for_the_end_of(int(said))
    assert errors == ""
