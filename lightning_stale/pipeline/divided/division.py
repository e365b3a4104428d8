"""A model, its followers and its optimizers divided among ranks, and how they are put together again on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.pipeline.divided.model import DividedModel
from lightning_stale.pipeline.divided.optimizer import DividedOptimizer
from lightning_stale.pipeline.divided.tensors import adopt, named_tensors, tensors_of

Gather = Callable[[Any], "list[Any] | None"]
"""Returns its argument of every rank on rank 0, and None on the others."""

Spread = Callable[["list[Any] | None"], Any]
"""Returns, on every rank, its entry of the list that rank 0 has."""


class Division:
    """Takes what other ranks own out of memory, and out of the optimizers.

    Every rank has one, and all of them call the same methods in the same order: they gather.

    Args:
        model: the model, of which at least this rank's part is in memory.
        own: the names of the tensors that each rank owns.
        readable: the names of those that all keep besides, because nobody changes them.
        rank: this one.
        optimizers: over the whole model; none where nothing is trained.
        followers: models with the same tensors in the same order, such as averages of it: divided likewise, and equal
            to those of rank 0.
        gather, spread: move values.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Sequence[set[str]],
        readable: set[str],
        *,
        rank: int,
        optimizers: Iterable[Optimizer],
        followers: Iterable[nn.Module] = (),
        gather: Gather,
        spread: Spread,
    ) -> None:
        self._own, self._ranks, self._gather, self._spread = own[rank], len(own), gather, spread
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shares = [DividedOptimizer(optimizer, names, self._own) for optimizer in optimizers]
        self._model = DividedModel(model, self._own | readable)
        self._followers: list[tuple[DividedModel, dict[str, str]]] = []
        for follower in followers:
            theirs = _pair(model, follower)
            kept = [_renamed(names_of | readable, theirs) for names_of in own]
            give(follower, kept, rank, torch.device("cpu"), spread)
            self._followers.append((DividedModel(follower, kept[rank]), theirs))

    def values(self) -> dict[str, Tensor] | None:
        """Return all tensors of the whole model by name, on rank 0; those that are in no ``state_dict()`` too."""
        return _merged(self._gather(tensors_of(self._model.model, self._own)))

    def state_dict(self, values: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """Return what the model's own ``state_dict()`` says where ``values`` are in it; elsewhere, of a part."""
        with self._model.whole(values or {}):
            return self._model.model.state_dict()

    def stand_ins(self, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return the whole tensors by the ``id`` of what stands for them in the model."""
        return self._model.made_of(values)

    def follower_state_dict(self, follower: nn.Module, state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``state_dict`` says while the whole ``follower`` is in memory, on rank 0."""
        divided, theirs = next((d, names) for d, names in self._followers if d.model is follower)
        values = _merged(self._gather(tensors_of(follower, _renamed(self._own, theirs))))
        with divided.whole(values or {}):
            return state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the ``state_dict()`` of the whole optimizer on rank 0, and nothing elsewhere.

        ``None`` if it is not one that was divided.
        """
        for share in self._shares:
            if share.optimizer is optimizer:
                everyone = self._gather(share.state())
                return {} if everyone is None else share.complete(everyone)
        return None

    def load_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load this rank's part of the ``state_dict()`` of each optimizer."""
        for share, state in zip(self._shares, states, strict=False):
            share.load(state)

    def join(self, everywhere: bool = False) -> None:
        """Have the whole model and its whole optimizers again: on rank 0, or ``everywhere``."""
        own = self._own
        for divided, theirs in [(self._model, {name: name for name in own}), *self._followers]:
            values = _merged(self._gather(tensors_of(divided.model, _renamed(own, theirs))))
            if everywhere:
                values = self._everywhere(values)
            if values is not None:
                divided.join(values)
        for share in self._shares:
            states = self._gather(share.state())
            share.join(self._model.model, self._everywhere(states) if everywhere else states)
        self._shares, self._followers = [], []

    def give_up(self) -> None:
        """Say NaN where the values are lost."""
        for divided, _ in [(self._model, {}), *self._followers]:
            divided.join({})

    def _everywhere(self, value: Any) -> Any:
        return self._spread(None if value is None else [value] * self._ranks)


def give(model: nn.Module, kept: Sequence[set[str]], rank: int, device: torch.device, spread: Spread) -> None:
    """Give every rank those tensors of rank 0's ``model`` that it keeps.

    Args:
        model: in memory on rank 0.
        kept: the names, of each rank.
        rank: this one.
        device: where what has no memory yet gets it.
        spread: moves values.
    """
    adopt(model, spread([tensors_of(model, names) for names in kept] if rank == 0 else None), device)


def _merged(everyone: Sequence[Mapping[str, Tensor]] | None) -> dict[str, Tensor] | None:
    return None if everyone is None else {name: value for values in everyone for name, value in values.items()}


def _renamed(names: set[str], others: Mapping[str, str]) -> set[str]:
    return {others[name] for name in names if name in others}


def _pair(model: nn.Module, follower: nn.Module) -> dict[str, str]:
    """Return the name in ``follower`` of each tensor of ``model``."""
    mine, theirs = ([name for name, _ in named_tensors(each)] for each in (model, follower))
    return dict(zip(mine, theirs, strict=True))
