"""Bounded staleness: what a worker hears with each OK, and what the server has counted of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_stale.callbacks.monitoring.meter import Histograms, Meter, percent, share
from lightning_stale.events.histogram import together
from lightning_stale.parameter_server.apply import Plain
from lightning_stale.parameter_server.client import Release
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


class StaleSyncMeter(Meter):
    """Reads the last OK of this worker.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: StaleSyncStrategy) -> None:
        super().__init__()
        self._strategy = strategy
        self._refuses = type(strategy.apply) is not Plain
        self._last: Release | None = None
        self._forget()

    def _forget(self) -> None:
        self._oks = self._leads = self._staleness = self._refused = 0
        self._wait_s = self._compute_s = 0.0

    def end_batch(self, seconds: float) -> None:
        super().end_batch(seconds)
        release = self._strategy.last_release
        if release is None or release is self._last:  # amid a step of several batches
            return
        self._steps_so_far += 1 if self._last is None else max(1, release.clock - self._last.clock)
        self._last = release
        self._oks += 1
        self._leads += release.lead
        self._staleness += release.staleness
        self._refused += not release.applied
        self._wait_s += release.wait_s
        self._compute_s += release.compute_s

    def _of_this_worker(self) -> dict[str, float]:
        if self._oks == 0:
            return {}
        values = {
            "lead": self._leads / self._oks,
            "gradient": self._staleness / self._oks,
            "wait_share": share(self._wait_s, self._compute_s),
        }
        if self._refuses:
            values["refused"] = self._refused / self._oks
        if self._strategy.held_leases is not None:
            values["leases"] = float(self._strategy.held_leases)
        self._forget()
        return values

    def conditions(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._strategy.paradigm.thresholds.items()}

    def of_all(self, summary: Mapping[str, Any]) -> dict[str, float]:
        workers = summary["workers"]
        pushed = [worker for worker in workers if worker["pushes"]]
        if not pushed:
            return {}
        wait_s, compute_s = (sum(worker[name] for worker in workers) for name in ("wait_s", "compute_s"))
        values = {
            "updates": float(summary["updates"]),
            "lead": sum(worker["mean_lead"] for worker in pushed) / len(pushed),
            "max_lead": float(max(worker["max_lead"] for worker in pushed)),
            "gradient": sum(worker["mean_staleness"] for worker in pushed) / len(pushed),
            "max_gradient": float(max(worker["max_staleness"] for worker in pushed)),
            "wait_share": share(wait_s, compute_s),
            **self._samples_of_all(
                sum(worker["pushes"] / max(worker["wait_s"] + worker["compute_s"], 1e-9) for worker in pushed)
            ),
        }
        if self._refuses:
            values["refused"] = float(sum(worker["refused"] for worker in workers))
        if any(worker["leases"] for worker in workers):
            values["leases"] = float(sum(worker["leases"] for worker in workers))
            values["taken_back"] = float(summary["taken_back"])
        return values

    def line(self) -> dict[str, str]:
        last = self._last
        if last is None:
            return {}
        return {"lead": f"{last.lead}, late {last.staleness}, wait {percent(share(last.wait_s, last.compute_s))}"}

    def histograms(self, summary: Mapping[str, Any]) -> Histograms:
        workers = summary["workers"]
        return {
            "lead": together([worker["leads"] for worker in workers]),
            "gradient": together([worker["staleness"] for worker in workers]),
        }
