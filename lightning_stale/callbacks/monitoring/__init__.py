"""What StalenessMonitor is made of: a meter per kind of strategy, histograms, the table, and the file."""

from __future__ import annotations

from lightning_stale.callbacks.monitoring.averaging import AveragingMeter
from lightning_stale.callbacks.monitoring.meter import Meter
from lightning_stale.callbacks.monitoring.pipeline import PipelineMeter
from lightning_stale.callbacks.monitoring.stale_sync import StaleSyncMeter
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.dsp import DSPStrategy
from lightning_stale.strategies.hpsgd import HPSGDStrategy
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


def meter_of(strategy: object) -> Meter | None:
    """Return what reads the counts of ``strategy``; ``None`` if it is not of this package."""
    if isinstance(strategy, StaleSyncStrategy):
        return StaleSyncMeter(strategy)
    if isinstance(strategy, HPSGDStrategy):
        return AveragingMeter(strategy)
    if isinstance(strategy, DSPStrategy):
        return PipelineMeter(strategy)
    assert not isinstance(strategy, StaleStrategy), "it has counts: give it a meter"
    return None


__all__ = ["AveragingMeter", "Meter", "PipelineMeter", "StaleSyncMeter", "meter_of"]
