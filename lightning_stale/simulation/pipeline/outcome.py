"""What came out of a simulated pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_stale.simulation.pipeline.engine import StageRun


@dataclass(frozen=True)
class PipelineOutcome:
    """The figures of one setting; times in simulated seconds.

    Args:
        name: of the setting.
        staleness: ``m``: by how many batches the backward of each stage lags behind its forward.
        batches: of the epoch.
        own_rate: batches per second of the slowest stage alone: the limit.
        stages: what each did with its time.
    """

    name: str
    staleness: tuple[int, ...]
    batches: int
    own_rate: float
    stages: tuple[StageRun, ...]

    @property
    def seconds(self) -> float:
        """From the first forward to the last step of the slowest stage."""
        return max(stage.ended for stage in self.stages)

    @property
    def rate(self) -> float:
        """Batches per second."""
        return self.batches / self.seconds

    @property
    def efficiency(self) -> float:
        """Batches per second, over those of the slowest stage alone (without recomputation)."""
        return self.rate / self.own_rate

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Of each stage: the share of time in which it computes, recomputation included."""
        return tuple(stage.busy_s / self.seconds for stage in self.stages)

    @property
    def waiting(self) -> dict[str, tuple[float, ...]]:
        """Of each stage: shares of time in which it waits for features, for gradients, and for room to send."""
        of = {"features": "features_s", "gradients": "gradients_s", "sending": "sending_s"}
        return {what: tuple(getattr(stage, name) / self.seconds for stage in self.stages) for what, name in of.items()}

    def mean_waiting(self, what: str) -> float:
        """Return the mean of a share of :attr:`waiting` over the stages."""
        return sum(self.waiting[what]) / len(self.stages)

    def row(self) -> dict[str, Any]:
        """Return all figures as plain numbers, for JSON."""
        return {
            "setting": self.name,
            "staleness": list(self.staleness),
            "epoch_s": self.seconds,
            "batches_per_s": self.rate,
            "efficiency": self.efficiency,
            "utilisation": list(self.utilisation),
            "waiting": {what: list(shares) for what, shares in self.waiting.items()},
        }
