"""A model of which a rank keeps a part: the rest goes out of memory, and comes back in the end under the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_stale.pipeline.divided.tensors import like, slots, slots_on_meta


class DividedModel:
    """A model of which this rank keeps a part: the rest is on the meta device, where it takes no memory.

    The parameters that go are put aside, emptied, and are the ones that come back: who holds them (an optimizer, an
    ``nn.LSTM``, the user) has the trained values in the end.

    Args:
        model: the whole model.
        kept: the names of the tensors that stay.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from lightning_stale.pipeline.divided.model import DividedModel
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> parameters = list(model.parameters())
        >>> divided = DividedModel(model, {"0.weight"})
        >>> [parameter.device.type for parameter in model.parameters()]
        ['cpu', 'meta']
        >>> divided.join({"1.weight": torch.ones(1, 1)})
        >>> list(model.parameters())[1] is parameters[1], parameters[1].item()
        (True, 1.0)
    """

    def __init__(self, model: nn.Module, kept: set[str]) -> None:
        self.model = model
        self._aside: dict[int, Tensor] = {}  # by the id of what stands for it
        self._replaced: dict[int, Tensor] = {}  # the other way; shared ones stay shared
        for slot in slots(model):
            tensor = slot.tensor
            if tensor is not None and not tensor.is_meta and slot.path not in kept:
                slot.put(self._stand_in(tensor))
        for tensor in self._aside.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.grad = None

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._replaced:
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, tensor.requires_grad)
            self._replaced[id(tensor)] = empty
            self._aside[id(empty)] = tensor
        return self._replaced[id(tensor)]

    def made_of(self, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return parameters and buffers of ``values``, by the ``id`` of what stands for them."""
        made: dict[int, Tensor] = {}
        for slot, tensor in slots_on_meta(self.model):
            if slot.path in values and id(tensor) not in made:
                made[id(tensor)] = like(tensor, values[slot.path])
        return made

    @contextmanager
    def whole(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the model hold ``values``, by name, where it holds nothing, for a moment."""
        absent = slots_on_meta(self.model)
        made = self.made_of(values)
        for slot, tensor in absent:
            slot.put(made.get(id(tensor), tensor))
        try:
            yield
        finally:
            for slot, tensor in absent:
                slot.put(tensor)

    def join(self, values: Mapping[str, Tensor]) -> None:
        """Make the model whole again with ``values``, by name; what is not among them is lost, and becomes NaN.

        Buffers that were kept take their value too: their owner may have changed it.
        """
        made: dict[int, Tensor] = {}
        for slot, tensor in slots_on_meta(self.model):
            if id(tensor) not in made:
                value = values[slot.path] if slot.path in values else _lost(tensor)
                original = self._aside.get(id(tensor))
                if original is None:  # this rank has never held it
                    original = like(tensor, value)
                else:
                    original.data = value.detach().to(original.device)
                made[id(tensor)] = original
            slot.restore(made[id(tensor)])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers(remove_duplicate=False):
                if name in values and values[name] is not buffer:
                    buffer.copy_(values[name])
        self._aside, self._replaced = {}, {}


def _lost(tensor: Tensor) -> Tensor:
    filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return filled.fill_(float("nan")) if tensor.is_floating_point() or tensor.is_complex() else filled
