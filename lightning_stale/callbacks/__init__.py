"""Callbacks that show staleness, and that emulate unequal workers."""

from __future__ import annotations

from lightning_stale.callbacks.monitor import StalenessMonitor
from lightning_stale.callbacks.straggler import StragglerInjection

__all__ = ["StalenessMonitor", "StragglerInjection"]
