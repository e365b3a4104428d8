"""Which random numbers a step draws, when several stages of one model take part in it.

What a step draws before and after the body (mixup, say) must be the same on all ranks, since one of them uses the
features and another the targets. What a block draws (dropout) must be drawn again where it runs again.

Back-propagation draws what one process draws, in its order. A pipeline whose stages run at the same time has no such
order: there, everything follows from a seed and the number of the batch, on virtual stages and over processes alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_stale.pipeline.alike.random_state import RandomState, derive, kept

_STEP, _BLOCK, _OWN = range(3)


class Streams:
    """One process draws everything: nothing is to be done. Others derive from this."""

    @contextmanager
    def step(self, path: Sequence[int]) -> Iterator[None]:
        """A step, around the body; ``path``: numbers that tell it from all others."""
        yield

    @contextmanager
    def body(self) -> Iterator[None]:
        """All blocks of this process, within a step."""
        yield

    def block(self, stage: int) -> None:
        """The next block is that of ``stage``."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What a rank does with its own blocks: gradients, the optimizer's step."""
        yield

    def own(self, path: Sequence[int]) -> None:
        """Within :meth:`apart`: from here on, numbers that no other rank draws; ``path`` tells them from all others."""

    def tell(self) -> bytes:
        """Return what the next stage must know, with the features."""
        return b""

    def hear(self, told: bytes) -> None:
        """Take what the stage before has told."""


class DerivedStreams(Streams):
    """Everything in a step follows from a seed and the number of the batch; what is drawn between steps goes on.

    Args:
        seed: the same on all ranks.
        gpus: whose generators the step draws from.
    """

    def __init__(self, seed: bytes, gpus: Sequence[int] = ()) -> None:
        self._seed, self._gpus = seed, gpus
        self._path: tuple[int, ...] = ()

    @contextmanager
    def step(self, path: Sequence[int]) -> Iterator[None]:
        self._path = tuple(path)
        with kept(self._gpus):
            derive(self._seed, (_STEP, *path), self._gpus)
            yield

    @contextmanager
    def body(self) -> Iterator[None]:
        with kept(self._gpus):
            yield

    def block(self, stage: int) -> None:
        derive(self._seed, (_BLOCK, stage, *self._path), self._gpus)

    @contextmanager
    def apart(self) -> Iterator[None]:
        with kept(self._gpus):
            yield

    def own(self, path: Sequence[int]) -> None:
        derive(self._seed, (_OWN, *path), self._gpus)


class TravellingStream(Streams):
    """The one stream of a process that runs all blocks: it travels with the features, and ends at the last stage.

    From there it comes back to the other ranks before the next batch is loaded.

    Args:
        others: for what a rank without the last stage does with its own blocks; ``None`` on the last one's.
        gpus: whose generators the step draws from.
    """

    def __init__(self, others: Streams | None, gpus: Sequence[int] = ()) -> None:
        self._others, self._gpus = others, gpus

    def own(self, path: Sequence[int]) -> None:
        if self._others is not None:
            self._others.own(path)

    def tell(self) -> bytes:
        return RandomState.now(self._gpus).pack()

    def hear(self, told: bytes) -> None:
        RandomState.unpack(told, self._gpus).restore()
