"""What a stage does, in order, as data: a test reads it as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Operation(NamedTuple):
    """``("forward", n)`` or ``("backward", n)`` for batch ``n``."""

    kind: Literal["forward", "backward"]
    batch: int


def iteration(n: int, m: int) -> Iterator[Operation]:
    """Yield what a stage of staleness ``m`` does in iteration ``n`` (arXiv 1909.02625, Algorithm 1).

    Example::

        >>> from lightning_stale.pipeline.schedule import iteration
        >>> [tuple(operation) for n in range(4) for operation in iteration(n, m=2)]
        [('forward', 0), ('forward', 1), ('forward', 2), ('backward', 0), ('forward', 3), ('backward', 1)]
    """
    yield Operation("forward", n)
    if n >= m:
        yield Operation("backward", n - m)


def drain(batches: int, m: int) -> Iterator[Operation]:
    """Yield the backwards that are left after ``batches`` iterations, so that every batch updates the block once.

    Example::

        >>> from lightning_stale.pipeline.schedule import drain
        >>> [tuple(operation) for operation in drain(batches=4, m=2)]
        [('backward', 2), ('backward', 3)]
    """
    for n in range(max(0, batches - m), batches):
        yield Operation("backward", n)
