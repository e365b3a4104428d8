"""A Hydra app that trains for a moment; each rank writes what it has seen into the folder of the job."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from lightning_stale import StaleSyncStrategy, hydra_job
from tests.integration.models import Regression, loader, trainer


class Kind(Enum):
    PLAIN = 1
    OTHER = 2


@dataclass
class Config:
    strategy: str = "bsp"
    fault: str = "none"
    fails_in: Any = None
    devices: int = 2
    lr: float = 0.1
    text: str = ""
    kind: Kind = Kind.OTHER
    number: Any = "${hydra:job.num}"
    name: str = "${hydra:job.override_dirname}"
    doubled: int = 1


ConfigStore.instance().store(name="app", node=Config)


class Faulty(Regression):
    def __init__(self, fault: str, lr: float, folder: Path) -> None:
        super().__init__(lr=lr)
        self.fault, self.folder = fault, folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fault != "none" and self.global_step >= 2:
            (self.folder / f"under-way-{self.global_rank}").touch()
            if self.fault == "raise" and self.global_rank == 1:
                raise ValueError("a fault of rank 1")
            if self.fault == "raise 0" and self.global_rank == 0:
                raise ValueError("a fault of rank 0")
            if self.fault == "kill" and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def main(config: DictConfig) -> float:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    folder = Path(HydraConfig.get().runtime.output_dir)
    with open_dict(config):  # each rank gets what rank 0 got, not what it has made of it
        config.doubled *= 2
    fault = config.fault if config.fails_in is None or config.fails_in == HydraConfig.get().job.num else "none"
    seen = {
        "config": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "is_enum": config.kind is Kind.OTHER,
        "overrides": list(HydraConfig.get().overrides.task),
        "mode": str(HydraConfig.get().mode),
        "folder": os.getcwd(),
        "pid": os.getpid(),
        "path": sys.path,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    if fault == "early" and rank == 1:
        raise ValueError("an early fault of rank 1")
    strategy = (
        StaleSyncStrategy(paradigm="bsp", start_method="spawn") if config.strategy == "spawn" else config.strategy
    )
    model = Faulty(fault, config.lr, folder)
    t = trainer(config.devices, strategy, max_steps=-1 if fault == "endless" else 6, max_epochs=-1)
    t.fit(model, loader())
    t = trainer(config.devices, config.strategy, max_steps=6) if config.strategy != "spawn" else t
    t.validate(model, loader(samples=32), verbose=False)
    if fault == "late" and rank == 1:
        raise ValueError("a late fault of rank 1")
    if rank == 0:
        torch.save(model.state_dict(), folder / "weights.pt")
    return float(config.lr)


if "UNDECORATED" not in os.environ:
    main = hydra_job(main)

if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=None, config_name="app")(main)()
