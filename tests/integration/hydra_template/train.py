"""An app with the structure of lightning-hydra-template, which most Hydra users start from, on handwritten digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from omegaconf import DictConfig

# as in the template, nothing here knows lightning-stale


def instantiate_all(config: DictConfig | None) -> list[Any]:
    """Return the callbacks, or loggers, of a config group."""
    return [hydra.utils.instantiate(entry) for entry in (config or {}).values() if "_target_" in entry]


def train(config: DictConfig) -> dict[str, Any]:
    """Fit, test the best weights, and return all metrics."""
    L.seed_everything(config.seed, workers=True)
    datamodule = hydra.utils.instantiate(config.data)
    model = hydra.utils.instantiate(config.model)
    callbacks = instantiate_all(config.get("callbacks"))
    loggers = instantiate_all(config.get("logger"))
    trainer: L.Trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    for logger in trainer.loggers:
        logger.log_hyperparams({"parameters": sum(p.numel() for p in model.parameters())})
    trainer.fit(model=model, datamodule=datamodule)
    metrics = dict(trainer.callback_metrics)
    best = trainer.checkpoint_callback.best_model_path
    trainer.test(model=model, datamodule=datamodule, ckpt_path=best, weights_only=False)  # a net is in it
    metrics |= trainer.callback_metrics
    if trainer.is_global_zero:
        found = {"best": best, "metrics": {name: float(value) for name, value in metrics.items()}}
        Path(config.paths.output_dir, "result.json").write_text(json.dumps(found))
    return metrics


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float:
    """Return the metric that a sweep optimizes."""
    return float(train(config)[config.optimized_metric])


if __name__ == "__main__":
    main()
