"""Worker processes that run the user's script again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stale.failures import RunFailedError
from lightning_stale.launchers.hydra.job import arrive, current_job
from lightning_stale.launchers.replacements import Replacements
from lightning_stale.lifeline import end_with
from lightning_stale.private import of_launchers, of_torch
from lightning_stale.private.of_launchers import SubprocessScriptLauncher

_DEATH_S = 10.0
"""A connection breaks a moment before the process that held it has ended."""
_STARTER = "LIGHTNING_STALE_RANK_0"
"""The process id of the script that has started ranks."""
_GRACE_S = 7.0
"""A rank that is connected hears of rank 0's end, and ends with an error that says so."""

_of_this_process: Replacements | None = None
"""Of the ranks that a script has started, in whichever fit of it."""


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's launcher by popen; in a Hydra job, each rank gets the job's config, and ends with the job.

    In an elastic fit, ranks of this host that die are replaced.
    """

    _replacements: Replacements | None = None
    _first = True

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether a notebook can use it: one rank is the notebook's own process, and there is no script to run."""
        return self.num_processes * self.num_nodes == 1

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if trainer is not None:
            trainer.strategy.check_before_launch(trainer)
        try:
            return launch(self, function, *args, trainer=trainer, **kwargs)
        except BaseException:
            if self._replacements is not None:
                self._replacements.fail()
            raise

    def kill(self, signum: Any) -> None:
        """Send ``signum`` to the ranks of this host: they end with this one, and nobody replaces them."""
        if self._replacements is not None:
            self._replacements.fail()
            self.procs = self._replacements.processes
        super().kill(signum)

    def begin_elastic_fit(self, max_restarts: int, rank: int) -> None:
        """From now on ranks of this host may die, and are replaced; called in the process that has started them.

        Args:
            max_restarts: how many are replaced at most.
            rank: of this process; one that is lost in an earlier fit has none any more.
        """
        if self._replacements is None:
            if self.cluster_environment.local_rank() == 0 and self.num_processes > 1:
                rank_zero_warn(
                    "a worker that dies ends this fit, as if it were not elastic: an earlier Trainer of the script has "
                    "started the workers, and its strategy is not elastic. Write elastic=True there too"
                )
            return
        if self._first:
            self._replacements.begin(max_restarts, f"max_restarts={max_restarts}; the others go on without it")
        else:
            self._replacements.begin(
                0,
                "this fit is not the first of the script, which a new process would begin with; the others go on",
                rank,
            )

    def end_elastic_fit(self, present: Collection[int]) -> None:
        """The fit is over; processes of this host that are not among the ranks ``present`` are ended."""
        if self._replacements is not None:
            self._replacements.end(present)
            self.procs = self._replacements.processes

    def watch(self, replacements: Replacements | None, first: bool) -> None:
        """Let ``replacements`` see to the ranks of this host, if it is this process that has started them.

        Args:
            replacements: of these.
            first: whether they have been started for this fit.
        """
        self._replacements, self._first = replacements, first
        if replacements is not None:
            self.procs = replacements.processes


def _is_elastic(trainer: Any) -> bool:
    """Whether a fit of it may lose ranks: then Lightning does not watch them, whatever comes before that fit."""
    return trainer is not None and getattr(trainer.strategy, "elastic", None) is not None


def _first_rank(launcher: SubprocessScriptLauncher) -> int:
    return launcher.cluster_environment.node_rank() * launcher.num_processes


def _start(num_processes: int, first_rank: int) -> Replacements:
    command, environment = of_launchers.script_command(), dict(os.environ)
    looked = time.monotonic()

    def start(local_rank: int, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(local_rank), **variables})

    def check() -> bool:
        nonlocal looked
        if time.monotonic() < looked + of_launchers.OBSERVED_S:
            return False
        looked = time.monotonic()
        return of_launchers.end_all_with_one(list(processes.values()))

    processes = {local_rank: start(local_rank, {}) for local_rank in range(1, num_processes)}
    return Replacements(processes, start, first_rank, check)


def launch(
    launcher: SubprocessScriptLauncher, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
) -> Any:
    """Start the ranks, and call ``function(*args, **kwargs)``.

    Lightning starts the app with its whole command line again: under ``--multirun``, each rank would run a sweep of its
    own. And a rank that dies takes the main process with it; here it ends the job, and the sweep goes on.

    Raises:
        RunFailedError: if a rank is lost.
    """
    job, elastic = current_job(), isinstance(launcher, ScriptLauncher) and _is_elastic(trainer)
    if job is None:
        _end_with_rank_0(launcher)
    environment, num_processes = launcher.cluster_environment, launcher.num_processes
    if job is None and not elastic:
        return of_launchers.lightnings_launch(launcher, function, *args, trainer=trainer, **kwargs)
    environment.validate_settings(num_devices=num_processes, num_nodes=launcher.num_nodes)
    if job is None:
        global _of_this_process
        assert isinstance(launcher, ScriptLauncher)
        first = not environment.creates_processes_externally
        if first:
            of_launchers.announce(launcher)
            _of_this_process = _start(num_processes, _first_rank(launcher))
        launcher.watch(_of_this_process, first)
        of_launchers.share_threads(num_processes)
        return function(*args, **kwargs)
    first = not environment.creates_processes_externally
    try:
        if not first:
            arrive()
        else:
            of_launchers.announce(launcher)
            launcher.procs = job.start(num_processes)
            if elastic:
                job.replace_lost(_first_rank(launcher))
            else:
                job.all_have_come()
        if elastic:
            assert isinstance(launcher, ScriptLauncher)
            launcher.watch(job.replacements, first)
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
