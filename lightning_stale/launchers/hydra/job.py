"""One Hydra job of this process: the ranks that it has started, and the environment that it started from."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

from lightning_stale.failures import RunFailedError
from lightning_stale.launchers.hydra.command import in_joblib_worker, rank_command, rank_environment, save_config
from lightning_stale.launchers.replacements import Replacements, how_it_ended
from lightning_stale.lifeline import end_with
from lightning_stale.private import of_torch

_OF_RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
VARIABLES = (*_OF_RANKS, "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""What Lightning sets for its ranks and samplers, and takes for the user's when it finds it."""
_FOLDER = "LIGHTNING_STALE_RANKS"
"""Names the folder in which the ranks of a job find their config, and say that they have come to train."""

_ARRIVAL_S = 1800.0  # torch's own limit for a rendezvous
_FINISHED_S = 60.0
_FAILED_S = 10.0
_PATIENCE_S = 30.0
_POLL_S = 0.05

log = logging.getLogger(__name__)


def destroy_process_group() -> None:
    """Destroy the default process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_group_of_one() -> None:
    """End what a run on one device has left in this process: ranks that it forks would take it for their own."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()
    if os.environ.get("WORLD_SIZE") == "1":
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


class Job:
    """A Hydra job, from its first Trainer on."""

    def __init__(self) -> None:
        self.config = HydraConfig.instance().cfg
        """Another object in every job."""
        self.failed = False
        """Whether rank 0 has failed: the other ranks are not given time to finish then."""
        self._environment = {name: os.environ.get(name) for name in VARIABLES}
        self._threads = torch.get_num_threads()
        self._launched = False
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self.replacements: Replacements | None = None
        """Of its ranks, in elastic fits."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # in which ranks find the config
        self._rank_environment: dict[str, str] = {}
        self._ended = threading.Event()

    def start(self, num_processes: int) -> list[subprocess.Popen[bytes]]:
        """Start the local ranks from 1 on, and wait until each of them has come to train; return them.

        Raises:
            RunFailedError: if one ends before.
        """
        self._launched = True
        atexit.register(self.end)
        if in_joblib_worker():  # which would outlive a sweep that is killed
            end_with(os.getppid(), grace_s=0.0)
        self._folder = tempfile.TemporaryDirectory(prefix="lightning-stale-ranks-", ignore_cleanup_errors=True)
        self._rank_environment = rank_environment()
        try:
            save_config(self._config)
            for rank in range(1, num_processes):
                self._ranks[rank] = self.start_rank(rank, {_FOLDER: self._folder.name})
            self._wait_for_arrival(Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        return list(self._ranks.values())

    def start_rank(self, rank: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a local rank, with further environment variables."""
        environment = {**self._rank_environment, "LOCAL_RANK": str(rank), **variables}
        return subprocess.Popen(rank_command(self._config), env=environment)

    def replace_lost(self, first_rank: int) -> None:
        """Let ranks that die in an elastic fit be replaced; the config is kept for them until the job ends.

        Args:
            first_rank: the global rank of this process.
        """
        self.replacements = Replacements(self._ranks, self.start_rank, first_rank)

    def all_have_come(self) -> None:
        """Nobody will need the config any more."""
        if self._folder is not None:
            self._folder.cleanup()

    def lost(self, wait_s: float = 0.0, any_code: bool = False) -> str | None:
        """Return how a rank has ended that should not have, if one has by now or in ``wait_s`` seconds."""
        deadline = time.monotonic() + wait_s
        while True:
            for rank, process in list(self._ranks.items()):
                code = process.poll()
                if code or (any_code and code == 0):
                    return f"rank {rank} (process {process.pid}) {how_it_ended(code)}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def end(self) -> str | None:
        """End the ranks and the process group, and restore the environment; return how a rank has failed, if so."""
        if self._ended.is_set():
            return None
        if self.failed:
            self._destroy_process_group()  # ranks that wait in a collective for this one fail
        if self.replacements is not None:
            self.replacements.close()
        lost = self._reap(_FAILED_S if self.failed else _FINISHED_S)
        self._destroy_process_group()
        self._ended.set()
        self.all_have_come()
        atexit.unregister(self.end)
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(self._threads)
        return lost

    @property
    def _config(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "config.pickle"

    def _destroy_process_group(self) -> None:
        if self._launched:  # and not torchrun, whose ranks train the next job too
            destroy_process_group()

    def _wait_for_arrival(self, folder: Path) -> None:
        """Ranks that fail before they meet would leave this one in a rendezvous that nothing interrupts."""
        deadline = time.monotonic() + _ARRIVAL_S
        while missing := [rank for rank in self._ranks if not (folder / str(rank)).exists()]:
            lost = self.lost(any_code=True)
            if lost is not None and any(self._ranks[rank].poll() is not None for rank in missing):
                raise RunFailedError("error", f"{lost} before it came to train")
            if time.monotonic() > deadline:
                raise RunFailedError("error", f"rank {missing[0]} has not come to train in {_ARRIVAL_S:.0f} s")
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        """When a rank has died, let no other one hang in a collective, as Lightning does, and let this process live."""
        while not self._ended.wait(1.0):
            if (self.replacements is not None and self.replacements.tolerates) or self.lost() is None:
                continue
            lost = self.lost()
            if not self._ended.wait(_PATIENCE_S):
                log.error("%s, and the others do not end: they are made to", lost)
                self._kill()
                of_torch.abort_collectives()
            return

    def _reap(self, grace_s: float) -> str | None:
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(process.poll() is None for process in self._ranks.values()):
            time.sleep(_POLL_S)
        lost = self.lost()
        hung = [rank for rank, process in self._ranks.items() if process.poll() is None]
        if hung:
            log.warning("rank %d has not ended %.0f s after rank 0: it is killed", hung[0], grace_s)
        self._kill()
        return lost

    def _kill(self) -> None:
        for process in self._ranks.values():
            process.kill()
        for process in self._ranks.values():
            process.wait()


_current: Job | None = None


def current_job() -> Job | None:
    """Return the Hydra job that runs in this process; of the one before it, nothing is left then."""
    global _current
    config = HydraConfig.instance().cfg
    if _current is not None and _current.config is not config:
        lost = _current.end()
        if lost is not None:
            log.error("in the job before this one, %s", lost)
        _current = None
    if _current is None and config is not None:
        _current = Job()
    return _current


def arrive() -> None:
    """Let rank 0 know that this rank, if a job has started it, has come to train."""
    folder = os.environ.pop(_FOLDER, None)
    if folder is not None:
        (Path(folder) / os.environ["LOCAL_RANK"]).touch()
