"""All ranks of one replica read the same batches and draw the same random numbers, and see that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgpack
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Generator
from torch.utils.data import DataLoader

from lightning_stale.pipeline.alike import fingerprint
from lightning_stale.pipeline.alike.random_state import RandomState
from lightning_stale.pipeline.alike.random_streams import DerivedStreams, Streams, TravellingStream
from lightning_stale.pipeline.alike.shared_order import share_order
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.private import of_lightning

_T = TypeVar("_T")
_SELDOM = 50  # a GPU is asked for the body's inputs in each 50th batch: it makes the process wait


class Ranks(Protocol):
    """As much of a strategy as is asked."""

    @property
    def world_size(self) -> int:
        """The number of ranks, which are one replica."""

    @property
    def global_rank(self) -> int:
        """This one."""

    @property
    def root_device(self) -> torch.device:
        """Where it computes."""

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Return rank 0's."""


class SameBatches:
    """What the first stage's rank and the last one's must have in common: one uses the features, the other the targets.

    Args:
        strategy: of all ranks.
    """

    def __init__(self, strategy: Ranks) -> None:
        self._strategy = strategy
        self._shared = strategy.world_size > 1
        device = strategy.root_device
        self._gpus = [device.index] if device.type == "cuda" else []
        self._seldom = bool(self._gpus)
        self._generators: list[Generator] = []
        self._batch: fingerprint.Fingerprint | None = None
        self._inputs = 0
        self._travels = False
        self.streams = Streams()
        """Which numbers steps draw."""

    # --- random numbers ---------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """Let all ranks go on with rank 0's random state; they have just met."""
        if not self._shared:
            return
        states = [generator.get_state() for generator in self._generators]
        packed, states = self._strategy.broadcast((RandomState.now(self._gpus).pack(), states))
        RandomState.unpack(packed, self._gpus).restore()
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def begin(self, fitting: bool, stale: bool) -> None:
        """Decide which numbers steps draw.

        Args:
            fitting: whether in ``fit``; else the stages evaluate several batches at the same time.
            stale: whether they train on several batches at the same time.
        """
        self.agree()
        derived = DerivedStreams(RandomState.now(self._gpus).digest(), self._gpus)
        self._travels = self._shared and fitting and not stale
        if self._travels:  # in validation too, since what it draws changes what training draws afterwards
            others = derived if self._strategy.global_rank > 0 else None
            self.streams = TravellingStream(others, self._gpus)
        elif stale or self._shared:
            self.streams = derived

    def follow(self, pipeline: Pipeline) -> None:
        """Before a batch is loaded: where one stream of numbers goes through all stages, it is rank 0's."""
        if self._travels:
            packed = pipeline.from_last(RandomState.now(self._gpus).pack() if pipeline.has_last else b"")
            if not pipeline.has_last:
                RandomState.unpack(packed, self._gpus).restore()

    # --- batches ----------------------------------------------------------------------------------------------------

    def prepare(self, loader: DataLoader[Any]) -> list[Callable[[], None]]:
        """Have all ranks draw the same order, and their workers and generators the same numbers.

        Returns:
            What undoes it.
        """
        if not self._shared:
            return []
        undo = [share_order(loader, of_lightning.batch_sampler(loader)), of_lightning.seed_workers_alike(loader)]
        if loader.generator is not None:
            loader.generator.set_state(self._strategy.broadcast(loader.generator.get_state()))
            if not any(generator is loader.generator for generator in self._generators):
                self._generators.append(loader.generator)
        return undo

    def note_batch(self, batch: Any) -> None:
        """Remember what the loader has given, on the CPU still."""
        self._batch = fingerprint.fingerprint(batch) if self._compares else None

    def tell(self, inputs: Any) -> bytes:
        """Return what this rank has seen of the batch and given to the body."""
        if not self._compares:
            return b""
        self._inputs += 1
        seen = not self._seldom or self._inputs <= 2 or self._inputs % _SELDOM == 0
        of_inputs = fingerprint.fingerprint(inputs) if seen else None
        told: bytes = msgpack.packb([self._batch, of_inputs, RandomState.now(self._gpus).digest()])
        self._batch = None
        return told

    def compare(self, mine: bytes, theirs: bytes, where: str) -> None:
        """See, on the last stage's rank, that the first one has seen the same batch.

        Raises:
            MisconfigurationException: says what differs, and what to write instead.
        """
        if not self._shared or mine == theirs:
            return
        (batch, inputs, drawn), (other_batch, other_inputs, other_drawn) = map(msgpack.unpackb, (mine, theirs))
        ranks = f"rank 0, with the last stage, and rank {self._strategy.world_size - 1}, with the first,"
        differs = fingerprint.difference(batch or [], other_batch or [])
        if differs is not None:
            raise MisconfigurationException(
                f"{ranks} have read different samples in {where} (different: {differs}), and features would be paired "
                "with another sample's targets. All stages together are one replica: yield the same samples on every "
                "rank. Split an IterableDataset by torch.utils.data.get_worker_info(), and not by the rank; do not ask "
                "for the rank in samplers, worker_init_fn and transforms; and seed generators of your own alike, or "
                "draw from torch's, random's and NumPy's global ones, outside of what runs on one rank only"
            )
        differs = fingerprint.difference(inputs or [], other_inputs or [])
        seen = inputs is not None and other_inputs is not None
        if differs is not None or (drawn != other_drawn and not seen):
            what = f"different: {differs}" if differs is not None else "they have drawn different random numbers"
            raise MisconfigurationException(
                f"{ranks} have computed different inputs of the module that was cut in {where} ({what}), and features "
                "would be paired with another sample's targets. What a step and the hooks before it draw must be the "
                "same on every rank: do not ask for the rank, draw from torch's, random's and NumPy's global "
                "generators, or seed those of your own alike, and let a callback that draws on one rank only have a "
                "generator of its own"
            )

    @property
    def _compares(self) -> bool:
        return self._shared and self._strategy.global_rank in (0, self._strategy.world_size - 1)
