"""An independent reference for the apply rules: the papers' master loops in NumPy, over one vector of weights.

``play`` runs pushes in a given order against the loops below. Workers compute the gradient of a small function at the
weights that they hold, so that every wrong weight, staleness or state shows in all that comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORKERS = 3
SHAPES = [(3,), (2, 2)]
PARTS = (slice(0, 3), slice(3, 7))  # of the vector: the two parameters
ORDER = (0, 0, 1, 0, 2, 2, 1, 0, 0, 0, 0, 0, 0, 2, 1, 1, 2, 0, 2, 2, 2, 2, 2, 2, 1, 0, 1, 2)
LR = 0.2

_generator = np.random.default_rng(5)
START = _generator.normal(size=7)
CURVATURE = np.diag(_generator.uniform(0.3, 1.5, 7)) + 0.05 * _generator.normal(size=(7, 7))
TARGETS = _generator.normal(size=(WORKERS, 7))  # each worker has data of its own


def gradient(weights: Any, worker: int) -> Any:
    return CURVATURE @ (np.tanh(weights) - TARGETS[worker])


def used(turn: int) -> list[bool]:
    """Which of the parameters have a gradient at this turn."""
    return [True, turn % 5 != 3]


def mask(turn: int) -> Any:
    return np.concatenate(
        [np.full(part.stop - part.start, float(u)) for part, u in zip(PARTS, used(turn), strict=True)]
    )


@dataclass
class Trajectory:
    """The weights and version after each push, the staleness of each, and which were applied."""

    weights: list[Any] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)

    @property
    def versions(self) -> list[int]:
        return [sum(self.applied[: i + 1]) for i in range(len(self.applied))]


Master = Callable[[Any, Any, Any, int, int, Any], Any]
"""(w_now, w_then, g, tau, worker, 1 where there is a gradient) -> the new weights, or None: not applied."""


def play(master: Master, order: Sequence[int] = ORDER, workers: int = WORKERS) -> Trajectory:
    """Let workers push in ``order``; each pulls at once, as under ASP."""
    seen, now, version = Trajectory(), START.copy(), 0
    held, pulled = [START.copy() for _ in range(workers)], [0] * workers
    for turn, worker in enumerate(order):
        g = gradient(held[worker], worker) * mask(turn)
        tau = version - pulled[worker]
        new = master(now, held[worker], g, tau, worker, mask(turn))
        if new is not None:
            now, version = new, version + 1
        held[worker], pulled[worker] = now.copy(), version
        seen.weights.append(now.copy())
        seen.staleness.append(tau)
        seen.applied.append(new is not None)
    return seen


def plain() -> Master:
    return lambda now, then, g, tau, worker, there: now - LR * g


def ringmaster(R: int) -> Master:
    """2501.16168, algorithm 4."""
    return lambda now, then, g, tau, worker, there: now - LR * g if tau < R else None


def delay_compensated(lam: float) -> Master:
    """1609.08326, algorithm 2 with a constant lambda."""
    return lambda now, then, g, tau, worker, there: now - LR * (g + lam * g * g * (now - then))


def delay_compensated_adaptive(lam: float) -> Master:
    """1609.08326, section 6: MeanSquare(t) = m MeanSquare(t-1) + (1-m) g^2; m = 0.95."""
    mean_square = np.zeros(7)

    def master(now: Any, then: Any, g: Any, tau: int, worker: int, there: Any) -> Any:
        mean_square[:] = np.where(there, 0.95 * mean_square + 0.05 * g**2, mean_square)
        return now - LR * (g + lam / np.sqrt(mean_square + 1e-7) * g * g * (now - then))

    return master


def dana(gamma: float) -> Master:
    """1907.11612, algorithm 5 (DANA-Slim): the worker's v and what it sends, and a master that only subtracts."""
    v = np.zeros((WORKERS, 7))

    def master(now: Any, then: Any, g: Any, tau: int, worker: int, there: Any) -> Any:
        v[worker] = np.where(there, gamma * v[worker] + g, v[worker])
        return now - LR * np.where(there, gamma * v[worker] + g, 0)

    return master


def scaled() -> Master:
    taus: list[int] = []

    def master(now: Any, then: Any, g: Any, tau: int, worker: int, there: Any) -> Any:
        taus.append(tau)
        return now - LR * (min(1.0, float(np.mean(taus)) / tau) if tau else 1.0) * g

    return master
