"""The Lightning shells around the algorithms."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stale.paradigms import PARADIGMS
from lightning_stale.strategies.dsp import DSPStrategy
from lightning_stale.strategies.hpsgd import HPSGDStrategy
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


def register_strategies() -> None:
    """Make ``Trainer(strategy="bsp")`` and the like work."""
    for name, paradigm in PARADIGMS.items():
        summary = (paradigm.__doc__ or "").splitlines()[0]
        StrategyRegistry.register(name, StaleSyncStrategy, description=summary, override=True, paradigm=name)
    for name, strategy in (("dsp", DSPStrategy), ("hpsgd", HPSGDStrategy)):
        summary = (strategy.__doc__ or "").splitlines()[0]
        StrategyRegistry.register(name, strategy, description=summary, override=True)


__all__ = ["DSPStrategy", "HPSGDStrategy", "StaleSyncStrategy", "register_strategies"]
