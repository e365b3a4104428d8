"""Start real workers with a hard time limit, and see to it that nothing of them is left.

``run_workers`` runs a function of a test module in one process per rank, as torchrun would: the environment says who is
who, and Lightning creates no processes of its own. The processes are forked from a server that has imported lightning
once, which saves seconds per test. ``run_script`` runs a script of its own, for the launchers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from tests.integration.startup import spares

ROOT = Path(__file__).parents[2]
STARTUP = Path(__file__).parent / "startup"
"""On the path of every script: its ``sitecustomize`` saves two thirds of what a script costs that imports lightning."""
PLAIN = {"LIGHTNING_STALE_TEST_GC": "plain"}
"""The environment of a script whose garbage collector nobody has touched, for tests of how it ends."""
MARK = "LIGHTNING_STALE_TEST"
"""An environment variable that every process of a test inherits: what has it and lives on is a leak."""

sys.path.append(str(STARTUP))  # of workers, and of a server that has to import a test's optimizer, and so lightning
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.integration.startup.forkserver",
        "lightning_stale",
        "lightning_stale.coordinator.round_leases",
        "lightning_stale.parameter_server.shard",
        "pytest",
        __name__,
        "tests.integration.models",
    ]
)


_SPARES = 4  # servers that rank 0 of a test may start; it starts what it needs beyond that for real
_SESSION = f"{os.getpid()}-{uuid.uuid4().hex}"
_LAST_WILL = f"""
import sys
sys.stdin.read()
import psutil
for process in psutil.process_iter():
    try:
        if process.environ().get({MARK!r}, "").startswith({_SESSION!r}):
            process.kill()
    except psutil.Error:
        pass
"""


@dataclass
class Worker:
    """How one rank ended."""

    rank: int
    exitcode: int | None = None
    result: Any = None
    error: str = ""
    """The traceback, if the function raised."""


@dataclass
class Workers:
    """A running group of workers."""

    mark: str
    folder: Path
    processes: list[ForkServerProcess] = field(default_factory=list)

    def pid(self, rank: int) -> int:
        """Return the process id of ``rank``."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def server(self) -> psutil.Process:
        """Return the parameter server's process, as soon as it is there."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for process in marked(self.mark, groups=[self.pid(rank) for rank in range(len(self.processes))]):
                with contextlib.suppress(psutil.Error):
                    if is_server(process):
                        return process
            time.sleep(0.05)
        raise AssertionError("no parameter server came up")

    def wait_for(self, name: str, timeout: float = 60.0) -> None:
        """Wait until a worker has called :func:`signal_test` with ``name``."""
        wait_for_file(self.folder / name, timeout)

    def join(self, timeout: float) -> list[Worker]:
        """Wait for all; return how each ended.

        Raises:
            AssertionError: if one is still there after ``timeout`` seconds, with where it hung.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if hung:
            for rank in hung:
                os.kill(self.pid(rank), signal.SIGUSR2)  # faulthandler
            time.sleep(1.0)
            stacks = "\n".join(f.read_text() for f in sorted(self.folder.glob("stack-*")))
            raise AssertionError(f"ranks {hung} were still running after {timeout} s:\n{stacks}")
        workers = []
        for rank, process in enumerate(self.processes):
            path = self.folder / f"result-{rank}"
            kind, value = pickle.loads(path.read_bytes()) if path.exists() else ("result", None)
            worker = Worker(rank, process.exitcode)
            setattr(worker, kind, value)
            workers.append(worker)
        return workers


@contextlib.contextmanager
def workers(
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    *args: Any,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Iterator[Workers]:
    """Start ``function(rank, *args, **kwargs)`` on ``world_size`` ranks; on the way out, nothing of them is left."""
    group = Workers(mark=_new_mark(), folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    for rank in range(world_size):
        environment = {
            MARK: group.mark,
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            **PLAIN,
            **(env or {}),
        }
        process = _context.Process(target=_main, args=(rank, str(folder), environment, function, args, kwargs))
        process.start()
        group.processes.append(process)
    try:
        yield group
    finally:
        pids = {process.pid for process in group.processes if process.pid is not None}
        alive = {process.pid for process in group.processes if process.pid is not None and process.is_alive()}
        leaked = leftovers(group.mark, grace=10.0, groups=pids, exclude=alive)
        kill_all(group.mark, pids)
        for process in group.processes:
            process.join()
    assert not leaked, f"left behind: {leaked}"


def run_workers(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = 90.0, **kwargs: Any
) -> list[Any]:
    """Run ``function(rank, *args, **kwargs)`` on all ranks; return the results by rank.

    Raises:
        AssertionError: if one raises, dies, hangs, or leaves a process behind.
    """
    with workers(function, world_size, folder, *args, **kwargs) as group:
        ended = group.join(timeout)
    failed = [worker for worker in ended if worker.exitcode != 0 or worker.error]
    assert not failed, "\n".join(f"rank {w.rank} (exit code {w.exitcode}):\n{w.error}" for w in failed)
    return [worker.result for worker in ended]


def is_server(process: psutil.Process, module: str = "lightning_stale.parameter_server") -> bool:
    """Whether ``process`` runs ``module``, the one or the other server: started for it, or forked."""
    return module in process.cmdline() or process.name() == module.rpartition(".")[2][: spares.NAME_BYTES]


def signal_test(folder: Path | str, name: str) -> None:
    """In a worker: let the test know that it got to ``name``."""
    (Path(folder) / name).touch()


def wait_for_file(path: Path, timeout: float = 60.0) -> None:
    """Wait until ``path`` exists.

    Raises:
        AssertionError: after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody came to {path.name!r} within {timeout} s"
        time.sleep(0.02)


@dataclass
class Script:
    """How a script ended."""

    returncode: int
    output: str
    mark: str


@contextlib.contextmanager
def script(
    code: str, folder: Path, *args: str, command: list[str] | None = None, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` as a script in a session of its own; on the way out, nothing of it is left.

    Args:
        code: the script.
        folder: its working directory.
        args: its arguments.
        command: what runs it, ``[sys.executable]`` by default, or e.g. torchrun's command line.
        env: further environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "script.py"
    path.write_text(code)
    mark = _new_mark()
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {MARK: mark, "PYTHONPATH": f"{ROOT}{os.pathsep}{STARTUP}", "OMP_NUM_THREADS": "1", **(env or {})}
    output = (folder / "output.txt").open("w+")
    process = subprocess.Popen(
        [*(command or [sys.executable]), str(path), *args],
        cwd=folder,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    process.mark = mark  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        alive = process.poll() is None
        leaked = [] if alive else leftovers(mark, grace=10.0)
        kill_all(mark)
        process.wait()
        output.close()
    assert not alive, f"the script was still running:\n{(folder / 'output.txt').read_text()[-8000:]}"
    assert not leaked, f"left behind: {leaked}\n{(folder / 'output.txt').read_text()[-8000:]}"


def run_script(code: str, folder: Path, *args: str, timeout: float = 120.0, **kwargs: Any) -> Script:
    """Run ``code`` as a script to its end, and return its output."""
    with script(code, folder, *args, **kwargs) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        mark = process.mark  # type: ignore[attr-defined]
    return Script(process.returncode, (folder / "output.txt").read_text(), mark)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_mark() -> str:
    """Return the mark of a test; what has it ends with this process, however that ends: a script may run for ever."""
    _leave_last_will()
    return f"{_SESSION}-{uuid.uuid4().hex}"


@functools.cache
def _leave_last_will() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _LAST_WILL], stdin=subprocess.PIPE, start_new_session=True)


def marked(mark: str, groups: Collection[int] = ()) -> list[psutil.Process]:
    """Return the living processes of a test: those with its mark, and those in the process groups of its workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getpgid(process.pid) in groups or process.environ().get(MARK) == mark:
                found.append(process)
    return found


def leftovers(mark: str, grace: float, groups: Collection[int] = (), exclude: Collection[int] = ()) -> list[str]:
    """Return what is left of a test after ``grace`` seconds: processes, and files in the shared-memory folder."""
    deadline = time.monotonic() + grace
    while True:
        processes = [process for process in marked(mark, groups) if process.pid not in exclude]
        files = list(Path("/dev/shm").glob("lightning-stale-*"))  # of whichever test: they live for a moment only
        if not (processes or files) or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    names = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            names.append(f"{process.pid}: {' '.join(process.cmdline())}")
    return names + [str(path) for path in files]


def kill_all(mark: str, groups: Collection[int] = ()) -> None:
    """Kill what is left of a test."""
    for process in marked(mark, groups):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _main(
    rank: int, folder: str, environment: dict[str, str], function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    os.environ.update(environment)
    os.setpgrp()  # what this worker forks is found by its group; what it executes, by the mark in the environment too
    if rank == 0:
        spares.keep(_SPARES)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # as in a user's process: DataLoader workers end with this one
    stack = (Path(folder) / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
    import torch

    torch.set_num_threads(1)
    try:
        value = ("result", function(rank, *args, **kwargs))
    except BaseException:
        value = ("error", traceback.format_exc())
    temporary = Path(folder) / f".result-{rank}"
    temporary.write_bytes(pickle.dumps(value))
    temporary.rename(Path(folder) / f"result-{rank}")
    if value[0] == "error":
        print(value[1], file=sys.stderr)
        sys.exit(1)


def _end_with_the_tests() -> None:
    tests = multiprocessing.parent_process()
    assert tests is not None
    tests.join()
    os.kill(os.getpid(), signal.SIGKILL)
