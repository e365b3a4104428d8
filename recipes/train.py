"""Train an image classifier with any strategy, from a Hydra config (``conf/train.yaml``).

    python recipes/train.py trainer/strategy=dssp trainer.devices=4

``--help`` shows the groups and more examples. Everything of a run is in its folder below ``outputs/``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig
from rich.console import Console

from lightning_stale import hydra_job
from lightning_stale.callbacks.monitoring.table import summary_table
from recipes import schemas  # noqa: F401 - of the configs
from recipes.provenance import save_provenance
from recipes.report import results_table


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@hydra_job
def main(config: DictConfig) -> float | None:
    """Train and test; return the objective, if there is a sweeper."""
    be_quiet()
    check(config)
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # or Lightning chooses; hydra_job puts it back
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = hydra.utils.instantiate(config.data)
    model = hydra.utils.instantiate(config.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.get("callbacks", {}).values()]
    loggers = [hydra.utils.instantiate(logger) for logger in config.get("logger", {}).values()]
    trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    folder = Path(config.output)
    if trainer.is_global_zero:
        save_provenance(config, folder)

    started = time.perf_counter()
    trainer.fit(model, data, ckpt_path=config.ckpt_path and to_absolute_path(config.ckpt_path))
    seconds = time.perf_counter() - started
    metrics = plain(trainer.callback_metrics)
    summary = trainer.strategy.summary() if hasattr(trainer.strategy, "summary") else None
    if config.test:
        trainer.test(model, data, verbose=False)
        metrics |= plain(trainer.callback_metrics)
    if not trainer.is_global_zero:
        return None

    results = {"seconds": seconds, "metrics": metrics, "summary": summary}
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    console = Console()
    console.print(results_table(metrics))
    if summary is not None:
        console.print(summary_table(summary))
    if trainer.world_size == 1 and "workers" in (summary or {}):
        console.print("One worker, so nothing was stale: write trainer.devices=4 for four.")
    console.print(f"{seconds:.1f} s, the start of the workers included. Everything is in {folder}", soft_wrap=True)
    return objective(config.objective, metrics) if HydraConfig.get().mode == RunMode.MULTIRUN else None


def be_quiet() -> None:
    """Leave the terminal to the progress bar and the results; errors and our own warnings are shown."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch)\.")  # not lightning_stale


def check(config: DictConfig) -> None:
    """Refuse what composes and makes no sense."""
    for group in ("callbacks", "logger"):
        for name, node in config.get(group, {}).items():
            if "_target_" not in node:
                raise ValueError(
                    f"{group}.{name} has values but no _target_: choose it as well, {group}=[default,{name}], or leave "
                    f"{group}.{name}... out"
                )


def plain(metrics: Any) -> dict[str, float]:
    """Return the module's metrics as numbers; LearningRateMonitor's are no results."""
    return {name: float(value) for name, value in metrics.items() if not name.startswith("lr-")}


def objective(name: str, metrics: dict[str, float]) -> float:
    """Return the metric that the sweeper asked for."""
    if name not in metrics:
        raise ValueError(f"objective={name} was not logged: write one of {', '.join(sorted(metrics))}")
    return metrics[name]


if __name__ == "__main__":
    main()
