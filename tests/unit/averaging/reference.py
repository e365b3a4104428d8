"""HPSGD written down once more, for ranks in lockstep in one process: what the rounds of the package must equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

Outer = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""(global weights, mean change) -> global weights."""


def subtract(weights: list[Tensor], mean: list[Tensor]) -> list[Tensor]:
    return [w - m for w, m in zip(weights, mean, strict=True)]


def nesterov(lr: float, momentum: float) -> Outer:
    """``b = momentum b + g;  W = W - lr (g + momentum b)``."""
    buffers: list[Tensor] = []

    def outer(weights: list[Tensor], mean: list[Tensor]) -> list[Tensor]:
        past = buffers or [torch.zeros_like(m) for m in mean]
        buffers[:] = [momentum * b + m for b, m in zip(past, mean, strict=True)]
        return [w - lr * (m + momentum * b) for w, m, b in zip(weights, mean, buffers, strict=True)]

    return outer


@torch.no_grad()
def hpsgd(
    replicas: Sequence[Sequence[Tensor]],
    step: Callable[[int, int], None],
    steps: int,
    interval: int,
    merge: str,
    outer: Outer = subtract,
    flushes: Collection[int] = (),
) -> list[Tensor]:
    """Train ``replicas`` (per rank, equal at the start) and return the flushed global weights.

    Args:
        step: ``step(rank, number)`` changes the replica of ``rank``.
        steps: of each rank.
        interval: steps per round, H.
        merge: ``"hpsgd"`` or ``"cocod"``.
        outer: what a mean change does to the global weights.
        flushes: numbers of steps after which there is a flush, besides the one at the end.
    """
    ranks = range(len(replicas))
    weights = [p.clone() for p in replicas[0]]
    at_launch = [[p.clone() for p in replica] for replica in replicas]
    in_flight: list[list[Tensor]] | None = None
    in_round = 0

    def changes() -> list[list[Tensor]]:
        return [[old - new for old, new in zip(at_launch[rank], replicas[rank], strict=True)] for rank in ranks]

    def apply(of_all: list[list[Tensor]]) -> list[Tensor]:
        return outer(weights, [sum(parts[1:], parts[0]) / len(parts) for parts in zip(*of_all, strict=True)])

    def restart(rank: int, values: list[Tensor]) -> None:
        for p, value in zip(replicas[rank], values, strict=True):
            p.copy_(value)
        at_launch[rank] = [p.clone() for p in replicas[rank]]

    for number in range(1, steps + 1):
        for rank in ranks:
            with torch.enable_grad():
                step(rank, number - 1)
        in_round += 1
        if in_round == interval:
            now = changes()
            if in_flight is not None:
                weights = apply(in_flight)
            for rank in ranks:
                if in_flight is None:
                    restart(rank, [p.clone() for p in replicas[rank]])
                elif merge == "hpsgd":
                    restart(rank, weights)
                else:
                    restart(rank, subtract(weights, now[rank]))
            in_flight, in_round = now, 0
        if number == steps or number in flushes:
            if in_flight is not None:
                weights = apply(in_flight)
            if in_round > 0:
                weights = apply(changes())
            for rank in ranks:
                restart(rank, weights)
            in_flight, in_round = None, 0
    return weights
