"""``staleness.json``: the numbers of the table, for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer

NAME = "staleness"


def content(trainer: Trainer, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written: ``summary()`` of the strategy, and of which run it is.

    Args:
        trainer: of the fit that has ended.
        summary: ``trainer.strategy.summary()``; keys that are numbers, of histograms, become strings in JSON.

    Returns:
        ``{"strategy": str, "world_size": int, "epochs": int, "steps": int, "summary": dict}``: the name of the
        strategy's class, the number of ranks, how many epochs are over and how many steps are taken
        (``trainer.current_epoch`` and ``trainer.global_step``), and the summary.
    """
    return {
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "summary": summary,
    }


def folder_of(trainer: Trainer) -> str:
    """Return the folder of the first logger that has one, or else the Trainer's; asks no other rank."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return str(next((folder for folder in folders if folder), trainer.default_root_dir))


def write(folder: str, values: Mapping[str, Any]) -> str:
    """Write ``values`` into ``folder``, in a file that was not there; return its path.

    It is ``staleness.json``, and where an earlier fit has left that, ``staleness-v1.json`` and so on, as Lightning
    calls its checkpoints.
    """
    system = get_filesystem(folder)
    system.makedirs(folder, exist_ok=True)
    number, path = 0, os.path.join(folder, f"{NAME}.json")  # it may be a URL
    while system.exists(path):
        number += 1
        path = os.path.join(folder, f"{NAME}-v{number}.json")
    with system.open(path, "w") as file:
        file.write(json.dumps(values, indent=2, default=_plain) + "\n")
    return path


def _plain(value: object) -> Any:
    """Return what JSON has for ``value``."""
    return value.item() if isinstance(value, torch.Tensor) else repr(value)
