"""A model that ranks hold together: placed, loaded, saved and put together again as the whole that the user knows."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_stale.pipeline.divided import piecewise
from lightning_stale.pipeline.divided.division import Division, give
from lightning_stale.pipeline.divided.meta_device import assign, initialize, on_meta
from lightning_stale.pipeline.divided.tensors import move, tensors_of, without_meta
from lightning_stale.private import of_lightning
from lightning_stale.strategies.replica import SingleReplicaStrategy

Whole = Literal["rank0", "all"]
_DIVIDED = ("state_dict", "optimizer_states", "current_model_state")  # the last is WeightAveraging's


class WholeModelStrategy(SingleReplicaStrategy):
    """Ranks that hold one model together: each computes with its part, and the user sees the whole.

    No rank but 0 ever holds more than its part, of weights and optimizer, and a piece on the way; rank 0 holds the
    whole, on the CPU, to write a checkpoint, and when the run is over.

    Args:
        gather: where the model and its optimizer are whole after a run: ``"rank0"``, or on ``"all"`` ranks.
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`.
    """

    def __init__(self, *, gather: Whole = "rank0", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if gather not in ("rank0", "all"):
            raise ValueError(
                f"gather={gather!r}: write 'rank0' (the model is whole on rank 0 after a run, and the others keep "
                "their part) or 'all'"
            )
        self.gather = gather
        self._part: Division | None = None
        self._mapped: set[int] = set()  # ids of the tensors that lie in the file of a checkpoint
        self._values: Mapping[str, Tensor] | None = None  # of the checkpoint that is being made, on rank 0

    @abstractmethod
    def _own(self) -> tuple[list[set[str]], set[str]]:
        """Return the names of the tensors that each rank owns, and of those that all may read."""

    @abstractmethod
    def _is_cut(self) -> bool:
        """Whether a run is under way."""

    @abstractmethod
    def _forget_batches(self) -> None:
        """Begin anew after a trial run: no batch is under way."""

    # --- placing ----------------------------------------------------------------------------------------------------

    def model_to_device(self) -> None:
        """Give each rank its part of rank 0's model, on the device; of the rest nothing is moved."""
        module = self._require_trainer().lightning_module
        self._see_to_values(module)
        if self.world_size == 1:
            self._leave_file(module, None)
            super().model_to_device()
            return
        own, readable = self._own()
        kept = [names | readable for names in own]
        give(module, kept, self.global_rank, self.root_device, self._spread)
        self._leave_file(module, kept[self.global_rank])
        move(module, kept[self.global_rank], self.root_device)
        of_lightning.note_device(module, self.root_device)
        self._undo_setup.append(of_lightning.skip_broadcast(module))

    def _see_to_values(self, module: nn.Module) -> None:
        """See that rank 0's model has values; of the others', what they own comes from there."""
        problem: Exception | None = None
        if self.is_global_zero and on_meta(module):
            try:
                self._initialize(module)
            except Exception as error:
                problem = error
        text = self.broadcast(f"rank 0: {problem!r}" if problem else "")
        if problem is not None:
            raise problem
        if text:
            raise MisconfigurationException(text)

    def _initialize(self, module: nn.Module) -> None:
        hook = getattr(module, "init_weights", None)
        if not callable(hook):
            raise MisconfigurationException(
                f"{on_meta(module)[0]!r} is on the meta device and has no value, and only the constructors that "
                "ran there know which: define init_weights() in the LightningModule (called without arguments, with "
                "memory for all tensors), load them with ckpt_path=..., or build the model outside of "
                "torch.device('meta')"
            )
        initialize(module, hook)

    def _leave_file(self, module: nn.Module, kept: set[str] | None) -> None:
        """Copy what lies in the file of a checkpoint, which may go or change, and is needed longer."""
        for tensor in tensors_of(module, kept).values():
            if id(tensor) in self._mapped:
                tensor.data = tensor.data.clone()
        self._mapped = set()

    def _divide(self, trainer: Trainer, trained: Sequence[Optimizer]) -> None:
        """Take the other ranks' parts out of memory."""
        module = trainer.lightning_module
        own, readable = self._own()
        averages = of_lightning.averaged_models(trainer)
        self._part = Division(
            module,
            own,
            readable,
            rank=self.global_rank,
            optimizers=trained,
            followers=[average.module for average in averages],
            gather=self._gather_at_first,
            spread=self._spread,
        )
        for average in averages:
            whole = partial(self._part.follower_state_dict, average.module, average.state_dict)
            average.state_dict = whole  # type: ignore[method-assign,assignment]
            self._undo_setup.append(partial(average.__dict__.pop, "state_dict", None))

    def _check_callbacks(self, trainer: Trainer) -> None:
        """Refuse callbacks that need the whole model in the middle of a run.

        Raises:
            MisconfigurationException: names the callback and the cure.
        """
        for callback in of_lightning.callbacks(trainer) if self.world_size > 1 else ():
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

    # --- moving values ----------------------------------------------------------------------------------------------

    def _gather_at_first(self, value: Any) -> list[Any] | None:
        packed = piecewise.Packed(value if self.global_rank > 0 else None)
        with self._all_ranks():
            return self._guard(lambda: piecewise.gather(packed, value, self.root_device))

    def _spread(self, values: list[Any] | None) -> Any:
        packed = [piecewise.Packed(value) for value in values or ()]
        with self._all_ranks():
            return self._guard(lambda: piecewise.spread(packed, values, self.root_device))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; the weights and states in it stay in the file where possible, until they are needed."""
        path = Path(str(checkpoint_path))
        if type(self.checkpoint_io) is not TorchCheckpointIO or not path.is_file() or not zipfile.is_zipfile(path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        return {entry: v if entry in _DIVIDED else tree_map(_copied, v) for entry, v in checkpoint.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights: into the whole model, or in the middle of a run, after a trial, into this rank's part."""
        module = self._require_trainer().lightning_module
        if self._is_cut():
            self._forget_batches()
            with _elsewhere():
                module.load_state_dict(checkpoint["state_dict"], strict=strict)
            return
        if self.is_global_zero and on_meta(module) and callable(getattr(module, "init_weights", None)):
            self._initialize(module)  # for what the checkpoint does not have
        with _elsewhere():
            super().load_model_state_dict(checkpoint, strict)
        if self.is_global_zero:
            taken = assign(module, checkpoint["state_dict"])
            self._mapped = {id(tensor) for tensor in tensors_of(module, taken).values()}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole model's weights on rank 0; elsewhere, what other ranks have is on the meta device."""
        if self._part is not None and self._require_trainer().interrupted:
            raise RuntimeError("the run has failed, and a checkpoint needs every stage: resume from the last one")
        self.meet("a checkpoint")
        if self._part is None:
            return super().lightning_module_state_dict()
        self._values = self._part.values()
        state: dict[str, Any] = tree_map(_on_cpu, dict(self._part.state_dict(self._values)))
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint; a module in it, such as a hyper-parameter, is whole."""
        if self._part is not None and self.is_global_zero:
            checkpoint = self._completed(checkpoint)
        self._values = None
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _completed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        assert self._part is not None
        whole = self._part.stand_ins(self._values or {})
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

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole optimizer's state, in the user's parameter order, on rank 0."""
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = None if self._part is None else self._part.optimizer_state(raw)
        return super().optimizer_state(optimizer) if state is None else tree_map(_on_cpu, state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of each optimizer's state."""
        if self._part is None:
            super().load_optimizer_state_dict({"optimizer_states": tree_map(_copied, checkpoint["optimizer_states"])})
        else:
            self._part.load_optimizers(checkpoint["optimizer_states"])

    # --- the end ----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Put the model and its optimizers together again; after a failure, rank 0 has NaN where values are lost."""
        if self._part is None:
            return
        module = self.lightning_module
        ended_well = module is not None and module._trainer is not None and not module.trainer.interrupted
        if ended_well:
            self._part.join(everywhere=self.gather == "all")
        elif self.is_global_zero:
            self._part.give_up()
        self._part = self._values = None

    def teardown(self) -> None:
        module = self.lightning_module
        if module is None:
            super().teardown()
            return
        with without_meta(module):
            super().teardown()


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Let values be loaded into what is on the meta device: they are another rank's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        yield


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) and not value.is_meta else value
