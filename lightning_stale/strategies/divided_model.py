"""A model that ranks hold together: placed, loaded, saved and put together again as the whole that the user knows."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.pipeline.divided import piecewise
from lightning_stale.pipeline.divided.division import Division, give
from lightning_stale.pipeline.divided.meta_device import assign, initialize, on_meta
from lightning_stale.pipeline.divided.tensors import move, tensors_of
from lightning_stale.private import of_lightning
from lightning_stale.private.of_torch import tree_map
from lightning_stale.strategies.collectives import Collectives
from lightning_stale.topology import Topology

Whole = Literal["rank0", "all"]
Owned = tuple[list[set[str]], set[str]]
"""The names of the tensors that each rank owns, and of those that all may read."""
_T = TypeVar("_T")
_DIVIDED = ("state_dict", "optimizer_states", "current_model_state")  # the last is WeightAveraging's


class DividedModel:
    """Each rank computes with its part, and the user sees the whole.

    No rank but 0 ever holds more than its part, of weights and optimizer, and a piece on the way; rank 0 holds the
    whole, on the CPU, to write a checkpoint, and when the run is over. With one rank, there is nothing to divide.

    Args:
        module: the user's.
        topology: of one replica.
        rank: this one.
        device: where its part is computed.
        collectives: of all ranks.
    """

    def __init__(
        self,
        module: LightningModule,
        topology: Topology,
        rank: int,
        device: torch.device,
        collectives: Collectives,
    ) -> None:
        self._module, self._topology, self._rank, self._device = module, topology, rank, device
        self._collectives = collectives
        self._division: Division | None = None
        self._mapped: set[int] = set()  # ids of the tensors that lie in the file of a checkpoint
        self._values: Mapping[str, Tensor] | None = None  # of the checkpoint that is being made, on rank 0

    @property
    def is_divided(self) -> bool:
        """Whether other ranks hold parts of it now."""
        return self._division is not None

    # --- placing ----------------------------------------------------------------------------------------------------

    def see_to_values(self, broadcast: Callable[[str], str]) -> None:
        """See that rank 0's model has values; of the others', what they own comes from there."""
        problem: Exception | None = None
        if self._rank == 0 and on_meta(self._module):
            try:
                self._initialize()
            except Exception as error:
                problem = error
        text = broadcast(f"rank 0: {problem!r}" if problem else "")
        if problem is not None:
            raise problem
        if text:
            raise MisconfigurationException(text)

    def place(self, owned: Owned) -> None:
        """Give each rank its part of rank 0's model, on the device; of the rest nothing is moved."""
        own, readable = owned
        kept = [names | readable for names in own]
        give(self._module, kept, self._rank, self._device, self._spread)
        self.leave_file(kept[self._rank])
        move(self._module, kept[self._rank], self._device)
        of_lightning.note_device(self._module, self._device)

    def leave_file(self, kept: set[str] | None = None) -> None:
        """Copy what lies in the file of a checkpoint, which may go or change, and is needed longer."""
        for tensor in tensors_of(self._module, kept).values():
            if id(tensor) in self._mapped:
                tensor.data = tensor.data.clone()
        self._mapped = set()

    def divide(self, owned: Owned, trained: Sequence[Optimizer], trainer: Trainer) -> list[Callable[[], object]]:
        """Take the other ranks' parts out of memory; return what undoes what is done for that to Lightning's averages.

        Args:
            owned: who owns what.
            trained: the optimizers.
            trainer: whose callbacks may hold averages of the model, which are divided alike.
        """
        own, readable = owned
        averages = of_lightning.averaged_models(trainer)
        self._division = Division(
            self._module,
            own,
            readable,
            rank=self._rank,
            optimizers=trained,
            followers=[average.module for average in averages],
            gather=self._gather_at_first,
            spread=self._spread,
        )
        return [
            of_lightning.replace(
                average, "state_dict", partial(self._division.follower_state_dict, average.module, average.state_dict)
            )
            for average in averages
        ]

    def _initialize(self) -> None:
        hook = getattr(self._module, "init_weights", None)
        if not callable(hook):
            raise MisconfigurationException(
                f"{on_meta(self._module)[0]!r} is on the meta device and has no value, and only the constructors that "
                "ran there know which: define init_weights() in the LightningModule (called without arguments, with "
                "memory for all tensors), load them with ckpt_path=..., or build the model outside of "
                "torch.device('meta')"
            )
        initialize(self._module, hook)

    # --- moving values ----------------------------------------------------------------------------------------------

    def _gather_at_first(self, value: Any) -> list[Any] | None:
        packed = piecewise.Packed(value if self._rank > 0 else None)
        return self._collectives.run("gather", lambda: piecewise.gather(packed, value, self._device))

    def _spread(self, values: list[Any] | None) -> Any:
        packed = [piecewise.Packed(value) for value in values or ()]
        return self._collectives.run("spread", lambda: piecewise.spread(packed, values, self._device))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def load_weights(self, state_dict: Mapping[str, Tensor], strict: bool) -> None:
        """Load the weights into the whole model."""
        if self._rank == 0 and on_meta(self._module) and callable(getattr(self._module, "init_weights", None)):
            self._initialize()  # for what the checkpoint does not have
        self.load_own_weights(state_dict, strict)
        if self._rank == 0:
            taken = assign(self._module, state_dict)
            self._mapped = {id(tensor) for tensor in tensors_of(self._module, taken).values()}

    def load_own_weights(self, state_dict: Mapping[str, Tensor], strict: bool) -> None:
        """Load the weights into this rank's part."""
        with _elsewhere():
            self._module.load_state_dict(state_dict, strict=strict)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole model's weights on rank 0; elsewhere, what other ranks have is on the meta device."""
        assert self._division is not None
        self._values = self._division.values()
        state: dict[str, Any] = tree_map(_on_cpu, dict(self._division.state_dict(self._values)))
        return state

    def complete(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the checkpoint that :meth:`state_dict` was for, with whole modules in it (hyper-parameters, say)."""
        if self._division is not None and self._rank == 0:
            checkpoint = self._completed(self._division, checkpoint)
        self._values = None
        return checkpoint

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the whole optimizer's state, in the user's parameter order, on rank 0; ``None`` if it is undivided."""
        state = None if self._division is None else self._division.optimizer_state(optimizer)
        return None if state is None else tree_map(_on_cpu, state)

    def load_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load this rank's part of each optimizer's state."""
        assert self._division is not None
        self._division.load_optimizers(states)

    def _completed(self, division: Division, checkpoint: dict[str, Any]) -> dict[str, Any]:
        whole = division.stand_ins(self._values or {})
        completed = dict(checkpoint)
        for entry, value in checkpoint.items():
            try:
                packed = piecewise.Packed(value)
            except (pickle.PicklingError, AttributeError, TypeError):
                continue  # not for this way of writing, or its error
            if not any(tensor.is_meta for tensor in packed.tensors):
                continue
            tensors = [whole.get(id(tensor), tensor) for tensor in packed.tensors]
            if any(tensor.is_meta for tensor in tensors):
                raise MisconfigurationException(
                    f"{entry!r} of the checkpoint holds tensors of the model that are on other ranks, and rank 0 "
                    "cannot write them: a callback or hook has copied them; let it copy what "
                    "trainer.strategy.lightning_module_state_dict() returns, called on all ranks, or average with "
                    "lightning.pytorch.callbacks.EMAWeightAveraging"
                )
            completed[entry] = packed.unpack(tensors)
        return completed

    # --- the end ----------------------------------------------------------------------------------------------------

    def join(self, ended_well: bool, gather: Whole) -> None:
        """Put the model and its optimizers together again; after a failure, rank 0 has NaN where values are lost."""
        if self._division is None:
            return
        if ended_well:
            self._division.join(everywhere=gather == "all")
        elif self._rank == 0:
            self._division.give_up()
        self._division = self._values = None


def load_mapped(io: CheckpointIO, path: Any, weights_only: bool | None) -> dict[str, Any] | None:
    """Load a checkpoint; weights and states stay in the file until they are needed. ``None`` where ``io`` cannot."""
    file = Path(str(path))
    if type(io) is not TorchCheckpointIO or not file.is_file() or not zipfile.is_zipfile(file):
        return None
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    return {entry: v if entry in _DIVIDED else copied(v) for entry, v in checkpoint.items()}


def copied(tree: _T) -> _T:
    """Return ``tree`` with copies of its tensors, which may lie in a file."""
    made: _T = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tree)
    return made


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that need the whole model in the middle of a run.

    Raises:
        MisconfigurationException: names the callback and the cure.
    """
    for callback in of_lightning.callbacks(trainer):
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{name} copies the whole model while it trains, of which each rank has a part: write "
                "lightning.pytorch.callbacks.WeightAveraging(), which averages part by part, or devices=1 "
                "(virtual stages)"
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{name} compares all weights and replaces parameters while it trains, of which each rank has a "
                "part: write devices=1 (virtual stages), or prune rank 0's model after fit"
            )


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Let values be loaded into what is on the meta device: they are another rank's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        yield


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) and not value.is_meta else value
