"""Training with staleness in PyTorch Lightning; importing it registers its strategies by name.

Example::

    >>> import lightning_stale
    >>> from lightning import Trainer
    >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="dssp", logger=False, enable_checkpointing=False)
    >>> trainer.strategy
    StaleSyncStrategy(paradigm=DSSP(lower=3, upper=15, enforce_upper=True), transport='auto')
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_stale.elastic import Elastic
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay

__version__ = "0.1.0"

if "lightning_stale_server" not in sys._xoptions:  # the server process needs torch, and not all of lightning
    from lightning_stale.callbacks import (
        StalenessMonitor,
        StepLog,
        StepTrace,
        StragglerInjection,
        ThresholdSchedule,
        Timeline,
    )
    from lightning_stale.launchers import hydra_job
    from lightning_stale.parameter_server.apply import (
        ApplyRule,
        Dana,
        DelayCompensated,
        Plain,
        Ringmaster,
        Scaled,
        StalePush,
        Step,
    )
    from lightning_stale.strategies import DSPStrategy, HPSGDStrategy, StaleSyncStrategy, register_strategies

    register_strategies()
else:

    def __getattr__(name: str) -> Any:
        """Import the rest after all: the module that defines the user's optimizer or apply rule may ask for it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lightning_stale.parameter_server import apply

        if hasattr(apply, name):
            return getattr(apply, name)
        from lightning_stale import callbacks, launchers, strategies

        return next(getattr(module, name) for module in (strategies, callbacks, launchers) if hasattr(module, name))


__all__ = [
    "ASP",
    "BSP",
    "DSSP",
    "SSP",
    "ApplyRule",
    "BoundedDelay",
    "DSPStrategy",
    "Dana",
    "DelayCompensated",
    "Elastic",
    "HPSGDStrategy",
    "Plain",
    "Ringmaster",
    "Scaled",
    "StalePush",
    "StaleSyncStrategy",
    "StalenessMonitor",
    "Step",
    "StepLog",
    "StepTrace",
    "StragglerInjection",
    "ThresholdSchedule",
    "Timeline",
    "hydra_job",
]
