"""The parameters and buffers of a model: by name, by where its modules hold them, in memory or on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_stale.private.of_modules import held_names, holder_of


class Slot(NamedTuple):
    """Where a module holds a tensor of the model; a shared tensor has several."""

    module: nn.Module
    name: str
    """In the module."""
    path: str
    """In the model."""

    @property
    def tensor(self) -> Tensor | None:
        """What is there now."""
        return holder_of(self.module, self.name)[self.name]

    def put(self, tensor: Tensor | None) -> None:
        """Have ``tensor`` there for a while."""
        holder_of(self.module, self.name)[self.name] = tensor

    def restore(self, tensor: Tensor) -> None:
        """Have ``tensor`` there to stay, and let a module know that has a list of its weights, as ``nn.LSTM``."""
        self.put(tensor)
        if isinstance(self.module, nn.RNNBase):
            setattr(self.module, self.name, tensor)


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield where tensors are held, or may be."""
    for prefix, module in list(model.named_modules()):  # one that is held twice must not be replaced twice
        for name in held_names(module):
            yield Slot(module, name, f"{prefix}.{name}" if prefix else name)


def slots_on_meta(model: nn.Module) -> list[tuple[Slot, Tensor]]:
    """Return where something is held that has no memory, and what."""
    held = [(slot, slot.tensor) for slot in slots(model)]
    return [(slot, tensor) for slot, tensor in held if tensor is not None and tensor.is_meta]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, then buffers, under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tensors_of(model: nn.Module, names: set[str] | None = None) -> dict[str, Tensor]:
    """Return those of the tensors of ``model`` that are in memory, by name; all, or those with these ``names``."""
    return {name: t for name, t in named_tensors(model) if not t.is_meta and (names is None or name in names)}


def tensors_named(model: nn.Module) -> set[str]:
    """Return the names of all tensors of ``model``."""
    return {name for name, _ in named_tensors(model)}


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` as the parameter or buffer that ``tensor`` is."""
    value = value.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


@torch.no_grad()
def adopt(model: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the tensors of ``model`` these ``values``, by name; those on the meta device get memory on ``device``.

    Raises:
        ValueError: for a shape that is not the model's, on this rank.
    """
    made: dict[int, Tensor] = {}
    for slot in slots(model):
        tensor, path = slot.tensor, slot.path
        if tensor is None or path not in values:
            continue
        value = values[path]
        if tensor.shape != value.shape:
            raise ValueError(
                f"{path!r} has shape {tuple(tensor.shape)} here and {tuple(value.shape)} on rank 0: build the same "
                "model on all ranks"
            )
        if not tensor.is_meta:
            if tensor is not value:
                tensor.copy_(value)
            continue
        if id(tensor) not in made:
            made[id(tensor)] = like(tensor, value.to(device))
        slot.restore(made[id(tensor)])


def move(model: nn.Module, names: set[str] | None, device: torch.device) -> None:
    """Move the tensors with these ``names`` (``None``: all) to ``device``, but for those on the meta device."""
    for name, tensor in named_tensors(model):
        if not tensor.is_meta and (names is None or name in names):
            tensor.data = tensor.data.to(device)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(device)


@contextmanager
def without_meta(model: nn.Module) -> Iterator[None]:
    """Take what is on the meta device out of ``model`` for a moment: it cannot be moved."""
    absent = slots_on_meta(model)
    for slot, _ in absent:
        slot.put(None)
    try:
        yield
    finally:
        for slot, tensor in absent:
            slot.put(tensor)
