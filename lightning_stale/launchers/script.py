"""Worker processes that run the user's script again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_stale.failures import RunFailedError
from lightning_stale.launchers.hydra.job import arrive, current_job
from lightning_stale.private import of_launchers, of_torch
from lightning_stale.private.of_launchers import SubprocessScriptLauncher

_DEATH_S = 10.0
"""A connection breaks a moment before the process that held it has ended."""


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
