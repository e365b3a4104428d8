"""The Lightning shells around the algorithms."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stale.paradigms import PARADIGMS
from lightning_stale.strategies.hpsgd import HPSGDStrategy
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


def register_strategies() -> None:
    """Make ``Trainer(strategy="bsp")`` and the like work."""
    for name, paradigm in PARADIGMS.items():
        summary = (paradigm.__doc__ or "").splitlines()[0]
        StrategyRegistry.register(name, StaleSyncStrategy, description=summary, override=True, paradigm=name)
    summary = (HPSGDStrategy.__doc__ or "").splitlines()[0]
    StrategyRegistry.register("hpsgd", HPSGDStrategy, description=summary, override=True)


__all__ = ["HPSGDStrategy", "StaleSyncStrategy", "register_strategies"]
