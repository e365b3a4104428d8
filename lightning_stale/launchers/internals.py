"""Reaches into private state of Lightning (2.6.6), torch (2.13) and Hydra (1.3); a test fails when one of them moves.

Those of the strategies are in :mod:`lightning_stale.strategies.internals`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig
from torch.distributed.distributed_c10d import _abort_process_group

lightnings_launch = _SubprocessScriptLauncher.launch
"""How Lightning starts ranks by popen, whatever :func:`replace_launch` does."""


def replace_launch(launch: Callable[..., Any]) -> Callable[[], None]:
    """Let ``launch(launcher, function, ...)`` start the ranks of every strategy with popen; return what undoes it."""
    _SubprocessScriptLauncher.launch = launch  # type: ignore[method-assign]

    def undo() -> None:
        _SubprocessScriptLauncher.launch = lightnings_launch  # type: ignore[method-assign]

    return undo


def announce(launcher: _SubprocessScriptLauncher) -> None:
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


def whole_config() -> DictConfig:
    """Return the Hydra job's config with its node ``hydra``: not the copy that the task function may have changed."""
    root: DictConfig = HydraConfig.get()._get_root()  # type: ignore[attr-defined]
    return root


def abort_collectives() -> None:
    """Make the collectives fail that this process waits in; gloo's do by themselves when a rank is gone."""
    if torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend():
        _abort_process_group()


def is_lost_connection(exception: BaseException) -> bool:
    """Whether a collective has failed, mostly because another rank is gone; gloo raises a plain ``RuntimeError``."""
    return isinstance(exception, torch.distributed.DistError) or (
        isinstance(exception, RuntimeError) and "gloo/" in str(exception)
    )
