"""Reaches into how Lightning starts ranks (read in 2.6.6); a test fails when something of it moves."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any, TypeAlias

from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

MultiProcessingLauncher: TypeAlias = _MultiProcessingLauncher
SubprocessScriptLauncher: TypeAlias = _SubprocessScriptLauncher


def forks(launcher: MultiProcessingLauncher) -> bool:
    """Whether ``launcher`` makes its ranks by fork."""
    return launcher._start_method == "fork"


lightnings_launch = SubprocessScriptLauncher.launch
"""How Lightning starts ranks by popen, whatever :func:`replace_launch` does."""


def replace_launch(launch: Callable[..., Any]) -> Callable[[], None]:
    """Let ``launch(launcher, function, ...)`` start the ranks of every strategy with popen; return what undoes it."""
    SubprocessScriptLauncher.launch = launch  # type: ignore[method-assign]

    def undo() -> None:
        SubprocessScriptLauncher.launch = lightnings_launch  # type: ignore[method-assign]

    return undo


def announce(launcher: SubprocessScriptLauncher) -> None:
    """Set the environment variables that the ranks find each other by."""
    environment = launcher.cluster_environment
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    os.environ["NODE_RANK"] = str(environment.node_rank())
    os.environ["LOCAL_RANK"] = str(environment.local_rank())
    os.environ["WORLD_SIZE"] = str(launcher.num_processes * launcher.num_nodes)


def share_threads(num_processes: int) -> None:
    """Let the ranks of a host share its cores, unless ``OMP_NUM_THREADS`` is set."""
    _set_num_threads_if_needed(num_processes=num_processes)


OBSERVED_S = 5.0
"""How often Lightning looks whether one of the ranks of this host has failed."""


def script_command() -> list[str]:
    """Return what starts this script again."""
    return list(_basic_subprocess_cmd())


def end_all_with_one(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Kill ``processes`` and this one if one of them has failed, as Lightning does; return whether all are over."""
    return bool(_ChildProcessObserver(main_pid=os.getpid(), child_processes=processes)._run())
