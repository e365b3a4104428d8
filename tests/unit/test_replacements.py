"""Who has died while an elastic fit runs is replaced, as often as was agreed; afterwards nobody is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_stale.launchers import replacements as module
from lightning_stale.launchers.replacements import JOIN, Replacements

SLEEPS = "import time; time.sleep(600)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Node:
    """Ranks 4 to 6 of a run, of which rank 4 is this process."""

    def __init__(self) -> None:
        self.started: list[tuple[int, dict[str, str], subprocess.Popen[bytes]]] = []
        self.code = SLEEPS
        self.checks = 0
        self.processes = {local_rank: self.start(local_rank, {}) for local_rank in (1, 2)}
        self.replacements = Replacements(self.processes, self.start, first_rank=4, check=self.check)

    def start(self, local_rank: int, variables: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-S", "-c", self.code])
        self.started.append((local_rank, dict(variables), process))
        return process

    def check(self) -> bool:
        self.checks += 1
        return False

    def alive(self) -> list[bool]:
        return [process.poll() is None for *_, process in self.started]


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.replacements.close()
    for *_, process in node.started:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_as_many_are_replaced_as_was_agreed(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.replacements.begin(2, "max_restarts=2; the others go on without it")
    first = node.processes[2]
    first.kill()
    until(lambda: len(node.started) == 3)
    assert node.started[2][:2] == (2, {JOIN: "6"})
    until(lambda: node.processes[2] is node.started[2][2])
    assert [record.getMessage() for record in caplog.records] == [
        f"rank 6 (process {first.pid}) was killed by SIGKILL: process {node.processes[2].pid} takes its place, "
        "1 replacement is left"
    ]
    node.processes[2].kill()
    until(lambda: len(node.started) == 4)
    until(lambda: node.processes[2] is node.started[3][2])
    node.processes[2].kill()
    until(lambda: 2 not in node.processes)
    until(lambda: len(caplog.records) == 3)
    assert caplog.records[1].getMessage().endswith("takes its place, the last replacement")
    assert (
        caplog.records[2]
        .getMessage()
        .endswith("was killed by SIGKILL, and is not replaced: max_restarts=2; the others go on without it")
    )
    assert len(node.started) == 4
    assert node.alive() == [True, False, False, False]


def test_one_that_has_failed_is_replaced_and_one_that_has_finished_is_not(node: Node) -> None:
    node.replacements.begin(3, "")
    node.code = "raise SystemExit(0)"
    with node.replacements._lock:
        node.processes[1].kill()
        node.processes[1] = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    until(lambda: len(node.started) == 3)
    until(lambda: 1 not in node.processes)
    assert node.started[2][:2] == (1, {JOIN: "5"})
    assert len(node.started) == 3


def test_after_the_fit_who_was_not_there_goes_and_nobody_comes(node: Node) -> None:
    node.replacements.begin(3, "")
    node.replacements.end({4, 6})
    assert node.alive() == [False, True]
    assert node.replacements.processes == [node.processes[2]]
    node.processes[2].kill()
    before = node.checks
    until(lambda: node.checks > before + 1)
    assert len(node.started) == 2, "after the fit they end together, as ever"


def test_those_who_are_left_are_counted_anew_in_a_later_fit(node: Node) -> None:
    node.replacements.begin(3, "")
    node.replacements.end({4, 6})
    node.replacements.begin(0, "", first_rank=4)
    node.replacements.end({4, 5})
    assert node.alive() == [False, True]


def test_after_a_failure_those_who_do_not_listen_are_killed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.5)
    node.replacements.begin(3, "")
    node.replacements.fail()
    node.processes[1].kill()
    until(lambda: node.alive() == [False, False])
    assert len(node.started) == 2
    until(lambda: not node.replacements._thread.is_alive())


def test_nobody_is_replaced_before_the_fit(node: Node) -> None:
    node.processes[1].kill()
    before = node.checks
    until(lambda: node.checks > before + 1)
    assert len(node.started) == 2


def test_an_interpreter_that_ends_ends_all(tmp_path: Any) -> None:
    """After a failure, with a rank that ignores everything."""
    script = (
        "import subprocess, sys\n"
        "from lightning_stale.launchers import replacements as module\n"
        "module._GRACE_S = 0.5\n"
        f"start = lambda *_: subprocess.Popen([sys.executable, '-S', '-c', {IGNORES!r}])\n"
        "processes = {1: start()}\n"
        "print(processes[1].pid, flush=True)\n"
        "r = module.Replacements(processes, start, 0)\n"
        "r.begin(1, '')\n"
        "r.fail()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=60, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
