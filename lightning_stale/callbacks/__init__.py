"""Callbacks that show staleness and step times, schedule it, and emulate unequal workers."""

from __future__ import annotations

from lightning_stale.callbacks.monitor import StalenessMonitor
from lightning_stale.callbacks.step_log import StepLog
from lightning_stale.callbacks.step_trace import StepTrace
from lightning_stale.callbacks.straggler import StragglerInjection
from lightning_stale.callbacks.threshold_schedule import ThresholdSchedule
from lightning_stale.callbacks.timeline import Timeline

__all__ = ["StalenessMonitor", "StepLog", "StepTrace", "StragglerInjection", "ThresholdSchedule", "Timeline"]
