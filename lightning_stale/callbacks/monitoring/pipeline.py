"""DSP: how much of the time stages compute, what they wait for, and how full their queues are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_stale.callbacks.monitoring.meter import Meter, percent
from lightning_stale.strategies.dsp import DSPStrategy


class PipelineMeter(Meter):
    """Reads the counts of this rank's stages, batch by batch: what is between batches, such as a drain, is left out.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: DSPStrategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._before = self._sums = [0.0] * 8  # numbers of `OfStage`
        self._spent_s = 0.0
        self._line: dict[str, str] = {}

    def begin_batch(self) -> None:
        self._before = self._strategy.counts.total.numbers()

    def end_batch(self, seconds: float) -> None:
        super().end_batch(seconds)
        now = self._strategy.counts.total.numbers()
        self._sums = [
            total + after - before for total, after, before in zip(self._sums, now, self._before, strict=True)
        ]
        self._spent_s += seconds

    def _of_this_worker(self) -> dict[str, float]:
        spent_s = self._spent_s
        if spent_s <= 0:
            return {}
        busy_s, features_s, gradients_s, _, features, features_queued, gradients, gradients_queued = self._sums
        self._sums, self._spent_s = [0.0] * 8, 0.0
        values = {"utilisation": busy_s / spent_s}
        if features:
            values |= {"wait_features": features_s / spent_s, "features_queued": features_queued / features}
        if gradients:
            values |= {"wait_gradients": gradients_s / spent_s, "gradients_queued": gradients_queued / gradients}
        return values

    def of_all(self, summary: Mapping[str, Any]) -> dict[str, float]:
        return {
            f"stage{row['stage']}/{name}": float(value)
            for row in summary["stages"]
            for name, value in row.items()
            if name not in ("stage", "parameters") and value is not None
        }

    def line(self) -> dict[str, str]:
        if self._spent_s > 0:
            busy_s, *waits_s = self._sums[:4]
            self._line = {"busy": f"{percent(busy_s / self._spent_s)}, wait {percent(sum(waits_s) / self._spent_s)}"}
        return self._line
