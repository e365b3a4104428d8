"""The Lightning shells around the algorithms."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stale.paradigms import PARADIGMS
from lightning_stale.strategies.base import StaleStrategy, StartMethod
from lightning_stale.strategies.dsp import DSPStrategy
from lightning_stale.strategies.hpsgd import HPSGDStrategy
from lightning_stale.strategies.stale_sync import StaleSyncStrategy
from lightning_stale.strategies.wrong_package import refuse_wrong_package

_START_METHODS: dict[str, StartMethod] = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""By the ending of a name, as Lightning has it for ``ddp``."""


def strategy_names() -> dict[str, tuple[type[StaleStrategy], dict[str, Any]]]:
    """Return what each name stands for: a class, and what it is made with."""
    plain: dict[str, tuple[type[StaleStrategy], dict[str, Any]]] = {
        **{name: (StaleSyncStrategy, {"paradigm": name}) for name in PARADIGMS},
        "dsp": (DSPStrategy, {}),
        "hpsgd": (HPSGDStrategy, {}),
    }
    return {
        f"{name}{ending}": (strategy, {**options, "start_method": method} if ending else options)
        for name, (strategy, options) in plain.items()
        for ending, method in _START_METHODS.items()
    }


def register_strategies() -> None:
    """Make ``Trainer(strategy="bsp")`` and the like work, and that of ``pytorch_lightning`` say what to import."""
    refuse_wrong_package(strategy_names(), StaleStrategy)
    for name, (strategy, options) in strategy_names().items():
        described = PARADIGMS[options["paradigm"]] if "paradigm" in options else strategy
        summary = (described.__doc__ or "").splitlines()[0]
        StrategyRegistry.register(name, strategy, description=summary, override=True, **options)


__all__ = ["DSPStrategy", "HPSGDStrategy", "StaleSyncStrategy", "register_strategies", "strategy_names"]
