"""What an app puts around its task function."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_stale.failures import RunFailedError
from lightning_stale.launchers.hydra.job import current_job
from lightning_stale.launchers.script import launch
from lightning_stale.private import of_launchers

_T = TypeVar("_T")
_failures: list[str] = []
log = logging.getLogger(__name__)


def hydra_job(task_function: Callable[[DictConfig], _T]) -> Callable[[DictConfig], _T]:
    """Let the ranks of every strategy start and end with a Hydra job, in single runs and in sweeps.

    The strategies of this package do so by themselves; Lightning's own ones, such as ``ddp``, start the whole sweep
    again in each rank. With this, all ranks of a job have the same config, nothing of a job is left when it ends, and a
    job that fails, in whichever rank, is logged in its own folder, while the sweep goes on as far as the sweeper allows
    it (Optuna: ``hydra.sweeper.max_failure_rate``).

    Args:
        task_function: the app's, under ``@hydra.main``.

    Raises:
        RunFailedError: from the task function, if another rank has failed.

    Example::

        >>> import hydra
        >>> from lightning_stale import hydra_job
        >>> @hydra.main(version_base="1.3", config_path=None)
        ... @hydra_job
        ... def main(config):
        ...     return float(config.lr)
    """

    @functools.wraps(task_function)
    def run(config: DictConfig) -> _T:
        with _logged(), _job():
            return task_function(config)

    return run


@contextlib.contextmanager
def _job() -> Iterator[None]:
    job = current_job()
    undo = of_launchers.replace_launch(launch)
    try:
        yield
    except BaseException:
        if job is not None:
            job.failed = True
            job.end()
        raise
    finally:
        undo()
    lost = None if job is None else job.end()
    if lost is not None:
        raise RunFailedError("error", f"{lost} after rank 0 had finished; what it printed stands above")


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Hydra itself prints the traceback of one failed job of a sweep, and to the console only."""
    try:
        yield
    except Exception:
        if HydraConfig.initialized() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            hydra = HydraConfig.get()
            log.exception("this job has failed")
            if hydra.mode == RunMode.MULTIRUN:
                if not _failures:
                    atexit.register(_list_failures)
                _failures.append(f"#{hydra.job.num} {hydra.job.override_dirname}: {hydra.runtime.output_dir}")
        raise


def _list_failures() -> None:
    print("Failed jobs:", *_failures, sep="\n  ", file=sys.stderr)
