"""One rank's part of a model that several ranks hold together, and how the whole is put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.pipeline.ownership import (
    OptimizerShare,
    complete_state_dict,
    own_values,
    put_back,
    release_others,
)


class Part:
    """Takes what other ranks own out of memory, and out of the optimizers.

    Every rank has one, and all of them call the same methods in the same order: they gather.

    Args:
        model: the whole model.
        own: the names of the tensors that this rank owns.
        readable: the names of those that it keeps besides, because nobody changes them.
        optimizers: over the whole model; none where nothing is trained.
        gather: returns its argument of every rank, on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        own: set[str],
        readable: set[str],
        optimizers: Iterable[Optimizer],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self._model, self._own, self._gather = model, own, gather
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shares = [OptimizerShare(optimizer, names, own) for optimizer in optimizers]
        release_others(model, own | readable)

    def state_dict(self) -> dict[str, Any]:
        """Return the ``state_dict()`` of the whole model."""
        return complete_state_dict(self._model, self._gather(own_values(self._model, self._own)))

    def values(self) -> dict[str, Tensor]:
        """Return all tensors of the whole model by name, those that are in no ``state_dict()`` too."""
        return {name: v for values in self._gather(own_values(self._model, self._own)) for name, v in values.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the ``state_dict()`` of the whole optimizer; ``None`` if it is not one that was divided."""
        for share in self._shares:
            if share.optimizer is optimizer:
                return share.complete(self._gather(share.state()))
        return None

    def load_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load this rank's part of the ``state_dict()`` of each optimizer."""
        for share, state in zip(self._shares, states, strict=False):
            share.load(state)

    def join(self) -> None:
        """Have the whole model and its whole optimizers on every rank again."""
        values = self.values()
        states = [share.complete(self._gather(share.state())) for share in self._shares]
        put_back(self._model, values)
        for share, state in zip(self._shares, states, strict=True):
            share.join(self._model, state)
        self._shares = []
