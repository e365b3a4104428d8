"""Worker processes that run the user's script again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lightning_stale.failures import RunFailedError
from lightning_stale.launchers.hydra.job import arrive, current_job
from lightning_stale.lifeline import end_with
from lightning_stale.private import of_launchers, of_torch
from lightning_stale.private.of_launchers import SubprocessScriptLauncher

_DEATH_S = 10.0
"""A connection breaks a moment before the process that held it has ended."""
_STARTER = "LIGHTNING_STALE_RANK_0"
"""The process id of the script that has started ranks."""
_GRACE_S = 7.0
"""A rank that is connected hears of rank 0's end, and ends with an error that says so."""


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's launcher by popen; in a Hydra job, each rank gets the job's config, and ends with the job."""

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether a notebook can use it: one rank is the notebook's own process, and there is no script to run."""
        return self.num_processes * self.num_nodes == 1

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if trainer is not None:
            trainer.strategy.check_before_launch(trainer)
        return launch(self, function, *args, trainer=trainer, **kwargs)


def launch(
    launcher: SubprocessScriptLauncher, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
) -> Any:
    """Start the ranks, and call ``function(*args, **kwargs)``.

    Lightning starts the app with its whole command line again: under ``--multirun``, each rank would run a sweep of its
    own. And a rank that dies takes the main process with it; here it ends the job, and the sweep goes on.

    Raises:
        RunFailedError: if a rank is lost.
    """
    job = current_job()
    if job is None:
        _end_with_rank_0(launcher)
        return of_launchers.lightnings_launch(launcher, function, *args, trainer=trainer, **kwargs)
    environment, num_processes = launcher.cluster_environment, launcher.num_processes
    environment.validate_settings(num_devices=num_processes, num_nodes=launcher.num_nodes)
    try:
        if environment.creates_processes_externally:
            arrive()
        else:
            of_launchers.announce(launcher)
            launcher.procs = job.start(num_processes)
        of_launchers.share_threads(num_processes)
        return function(*args, **kwargs)
    except BaseException as error:
        job.failed = True
        lost = job.lost(_DEATH_S, any_code=True) if of_torch.is_lost_connection(error) else None
        if lost is None:
            raise
        raise RunFailedError("error", f"{lost}; what it printed stands above") from error


def _end_with_rank_0(launcher: SubprocessScriptLauncher) -> None:
    """Let no rank outlive rank 0 in a rendezvous, which takes minutes to find that nobody comes."""
    if not launcher.cluster_environment.creates_processes_externally:
        os.environ[_STARTER] = str(os.getpid())
        return
    starter = int(os.environ.pop(_STARTER, 0)) if launcher.cluster_environment.local_rank() > 0 else 0
    if starter and (os.getppid() == starter or _is_gone(starter)):  # and not what one of its children has started
        says = "rank 0 has ended before this rank, which waited for it, had found it: this one ends too"
        end_with(starter, grace_s=_GRACE_S, says=says, stops=torch.distributed.is_initialized)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's has its number
        return True
    return False
