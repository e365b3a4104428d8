"""HPSGD: how long rounds are, and how much of their exchange nobody has waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_stale.callbacks.monitoring.meter import Meter, percent, share
from lightning_stale.events.averaging import AveragingCounts
from lightning_stale.strategies.hpsgd import HPSGDStrategy


class AveragingMeter(Meter):
    """Reads the counts of this worker, from one round to another.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: HPSGDStrategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._of = strategy.counts  # which a fit makes anew
        self._at_round = AveragingCounts()  # the counts when the values were made that are told now
        self._rounds: dict[str, float] = {}  # these
        self._wait_s = self._spent_s = 0.0  # in batches, since they were last asked for
        self._waited_before_s = 0.0

    def begin_batch(self) -> None:
        counts = self._strategy.counts
        if counts is not self._of:
            self._of, self._at_round = counts, AveragingCounts()
        self._waited_before_s = counts.wait_s

    def end_batch(self, seconds: float) -> None:
        super().end_batch(seconds)
        counts, before = self._strategy.counts, self._at_round
        self._steps_so_far = counts.steps
        self._wait_s += counts.wait_s - self._waited_before_s
        self._spent_s += seconds
        if counts.rounds > before.rounds:
            self._rounds = {
                "steps_per_round": (counts.steps - before.steps) / (counts.rounds - before.rounds),
                "hidden": _hidden(counts.wait_s - before.wait_s, counts.exchange_s - before.exchange_s),
            }
            self._at_round = replace(counts)

    def _of_this_worker(self) -> dict[str, float]:
        if not self._rounds:
            return {}
        values = {**self._rounds, "wait_share": share(self._wait_s, self._spent_s - self._wait_s)}
        self._wait_s = self._spent_s = 0.0
        return values

    def of_all(self, summary: Mapping[str, Any]) -> dict[str, float]:
        workers = summary["workers"]
        if not workers:
            return {}
        wait_s, compute_s = (sum(worker[name] for worker in workers) for name in ("wait_s", "compute_s"))
        return {
            "rounds": float(summary["updates"]),
            "steps_per_round": sum(worker["steps_per_round"] for worker in workers) / len(workers),
            "hidden": sum(worker["hidden"] for worker in workers) / len(workers),
            "wait_share": share(wait_s, compute_s),
            **self._samples_of_all(
                sum(worker["steps"] / max(worker["wait_s"] + worker["compute_s"], 1e-9) for worker in workers)
            ),
        }

    def line(self) -> dict[str, str]:
        if not self._rounds:
            return {}
        return {"hidden": f"{percent(self._rounds['hidden'])}, {self._rounds['steps_per_round']:.1f} steps"}


def _hidden(wait_s: float, exchange_s: float) -> float:
    return 1 - wait_s / max(exchange_s, 1e-9)
