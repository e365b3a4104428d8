"""The arguments of ``DSPStrategy`` that say how many stages there are must agree."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_stale.pipeline.partition.model import Split
from lightning_stale.pipeline.staleness import Staleness


def number_of_stages(
    stages: int | None, staleness: str | Sequence[int], queues: Sequence[int] | None, split: Split
) -> int | None:
    """Return how many stages these ask for; ``None``: as many as there are ranks.

    Raises:
        ValueError: for values that make no pipeline, or contradict each other.

    Example::

        >>> from lightning_stale.strategies.dsp_options import number_of_stages
        >>> number_of_stages(None, "dsp", None, split=["layer2", "layer3"])
        3
        >>> number_of_stages(None, (2, 0), None, split="params")
        2
    """
    if stages is None and not isinstance(staleness, str):
        stages = len(staleness)
    if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
        raise ValueError(f"stages={stages!r}: write an integer >= 1, e.g. stages=3")
    if isinstance(split, str) and split not in ("params", "time"):
        raise ValueError(
            f"split={split!r}: write 'params', 'time', where blocks start (split=[3, 6]), or the names of the "
            "submodules that start a block (split=['layer2', 'layer3'])"
        )
    if not isinstance(split, str) and split:
        if stages is not None and stages != len(split) + 1:
            raise ValueError(
                f"split={list(split)} makes {len(split) + 1} blocks for {stages} stages: write stages="
                f"{len(split) + 1} (and as many numbers in staleness), or {stages - 1} starts in split"
            )
        stages = len(split) + 1
    Staleness.of(staleness, stages or 3, queues)
    return stages
