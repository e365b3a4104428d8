"""Blocks of an ``nn.Sequential``: where they start, so that they are balanced, or as the user says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.private.of_modules import children


def balanced_starts(costs: Sequence[float], stages: int) -> list[int]:
    """Return where each further block starts, so that the most expensive block costs least.

    Args:
        costs: the cost of each layer, in any unit.
        stages: the number of blocks.

    Raises:
        PartitionError: if there are fewer layers than stages.

    Example::

        >>> from lightning_stale.pipeline.partition.sequential import balanced_starts
        >>> balanced_starts([4, 1, 1, 1, 1, 4], stages=3)
        [1, 5]
    """
    layers = len(costs)
    if layers < stages:
        raise PartitionError(
            f"{layers} layers cannot be cut into {stages} blocks: write stages={layers} or less, or cut a module with "
            "more layers (DSPStrategy(module=...))"
        )
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: the cost of the most expensive of k blocks that hold the first i layers, and where the last starts
    best = [[(total[i], 0) for i in range(layers + 1)]]
    for k in range(1, stages):
        row = [(float("inf"), 0)] * (k + 1)
        for i in range(k + 1, layers + 1):
            row.append(min((max(best[k - 1][j][0], total[i] - total[j]), j) for j in range(k, i)))
        best.append(row)
    starts, end = [], layers
    for k in range(stages - 1, 0, -1):
        end = best[k][end][1]
        starts.append(end)
    return starts[::-1]


def check_starts(split: Sequence[int], layers: int, stages: int) -> list[int]:
    """Return ``split`` if it says where ``stages - 1`` further blocks start.

    Raises:
        PartitionError: with what to write.
    """
    starts = list(split)
    example = [round(layers * k / stages) for k in range(1, stages)]
    if len(starts) != stages - 1:
        raise PartitionError(
            f"split={starts} makes {len(starts) + 1} blocks for {stages} stages: write {stages - 1} integers, e.g. "
            f"split={example}"
        )
    if any(not 0 < start < layers for start in starts) or sorted(set(starts)) != starts:
        raise PartitionError(
            f"split={starts}: write increasing integers between 1 and {layers - 1}, where each further block starts "
            f"among the {layers} children, e.g. split={example}"
        )
    return starts


def partition_sequential(body: nn.Sequential, starts: Sequence[int]) -> list[nn.Module]:
    """Return one ``nn.Sequential`` per block, over the same children."""
    layers = children(body)
    bounds = [0, *starts, len(layers)]
    return [nn.Sequential(OrderedDict(layers[a:b])) for a, b in pairwise(bounds)]
