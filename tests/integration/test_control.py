"""A coordinator in a process of its own, and ranks that meet, fail, die and fall silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from lightning_stale.coordinator.client import Control
from lightning_stale.coordinator.process import CoordinatorProcess, ServerStartError
from lightning_stale.failures import RunFailedError
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint

HOST = "127.0.0.1"
CREDENTIALS = Credentials.derive("a secret", "a run")

pytestmark = pytest.mark.timeout(60)


@contextmanager
def coordinator(members: int) -> Iterator[tuple[CoordinatorProcess, Endpoint]]:
    process = CoordinatorProcess()
    try:
        port = process.serve(members, HOST, CREDENTIALS)
        yield process, Endpoint(f"tcp://{HOST}:{port}", "", process.pid, [])
    finally:
        process.stop(grace_s=0.0)


def connect(endpoint: Endpoint, *ranks: int) -> list[Control]:
    return [Control(endpoint, CREDENTIALS, rank) for rank in ranks]


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Begin ``call``; what is returned waits for it, and gives its result or the exception that it has raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(30.0)
        assert results, "it still waits"
        return results[0]

    return result


def test_all_meet_and_the_process_ends_with_the_last_of_them() -> None:
    with coordinator(2) as (process, endpoint):
        first, second = connect(endpoint, 0, 1)
        for place in ("validation", "the end of fit"):
            first.come_to(place, "step 1")
            first.check()
            first.check(fresh=True)
            second.meet(place, "step 1")
            first.await_others()
        for control in (first, second):
            control.check(fresh=True)
            control.close(finished=True)
        process.stop(grace_s=30.0)
        assert process._process.returncode == 0


def test_different_places_are_told_to_all() -> None:
    with coordinator(2) as (_, endpoint):
        first, second = connect(endpoint, 0, 1)
        first.come_to("validation", "step 4")
        second.come_to("the end of fit", "step 3")
        for control in (first, second):
            with pytest.raises(RunFailedError, match=r"rank 0 is at validation \(step 4\); rank 1 is at the end"):
                control.await_others()
            control.close(finished=False)


def test_who_fails_tells_the_others_and_the_second_hears_of_the_first() -> None:
    with coordinator(3) as (_, endpoint):
        first, second, third = connect(endpoint, 0, 1, 2)
        waiting = in_thread(lambda: third.meet("validation"))
        assert first.fail("interrupt", "was interrupted") is None
        cause = second.fail("error", "raised ValueError")
        assert str(cause) == "rank 0 was interrupted"
        error = waiting()
        assert isinstance(error, RunFailedError)
        assert (error.kind, str(error)) == ("interrupt", "rank 0 was interrupted")
        for control in (first, second, third):
            control.close(finished=False)


DIE = """
import os, signal, sys
from lightning_stale.coordinator.client import Control
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
control = Control(Endpoint(sys.argv[1], "", 0, []), Credentials.derive("a secret", "a run"), rank=1)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def start_rank(endpoint: Endpoint) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "lightning_stale_server", "-c", DIE, endpoint.address]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_who_is_killed_is_named_with_its_process() -> None:
    with coordinator(2) as (_, endpoint):
        (first,) = connect(endpoint, 0)
        with start_rank(endpoint) as rank:
            try:
                assert rank.stdout is not None
                pid = int(rank.stdout.readline())
                first.check(fresh=True)
                rank.kill()
                rank.wait()
                with pytest.raises(RunFailedError, match=rf"rank 1 \(process {pid}\) is gone: it was killed"):
                    first.blame()
            finally:
                rank.kill()
        first.close(finished=False)


def test_a_coordinator_that_is_killed_is_rank_0_that_is_gone() -> None:
    with coordinator(2) as (process, endpoint):
        first, second = connect(endpoint, 0, 1)
        waiting = in_thread(lambda: second.meet("validation"))
        os.kill(process.pid, signal.SIGKILL)
        error = waiting()
        assert isinstance(error, RunFailedError)
        assert f"rank 0, or the coordinator beside it (process {process.pid}), at which all" in str(error)
        with suppress(RunFailedError):
            first.check(fresh=True)
        for control in (first, second):
            control.close(finished=False)


def test_a_rank_that_closes_without_a_goodbye_is_lost() -> None:
    with coordinator(2) as (_, endpoint):
        first, second = connect(endpoint, 0, 1)
        second.close(finished=False)
        with pytest.raises(RunFailedError, match="rank 1"):
            first.meet("validation")
        first.close(finished=False)


def test_an_address_that_is_not_this_hosts_is_told() -> None:
    process = CoordinatorProcess()
    with pytest.raises(ServerStartError, match="the coordinator did not start"):
        process.serve(2, "192.0.2.1", CREDENTIALS)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "import lightning_stale.coordinator.service, lightning_stale.coordinator.process, "
        "lightning_stale.coordinator.client, lightning_stale.coordinator.coordinator\n"
        "print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-X", "lightning_stale_server", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment())
    assert answer.stdout.strip() == "[]", answer.stderr
