"""Which parameters a rank owns: the others are taken out of memory, and put back in the end, under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


def own_names(model: nn.Module, mine: Iterable[nn.Module], cut: Iterable[nn.Module], with_rest: bool) -> set[str]:
    """Return the names of the tensors that a rank owns.

    Args:
        model: the whole model.
        mine: the blocks of this rank.
        cut: all blocks.
        with_rest: whether what lies outside of all blocks is this rank's too (the last stage's).
    """
    own = {id(tensor) for block in mine for _, tensor in _tensors(block)}
    in_blocks = {id(tensor) for block in cut for _, tensor in _tensors(block)}
    return {
        name for name, tensor in _tensors(model) if id(tensor) in own or (with_rest and id(tensor) not in in_blocks)
    }


def constant_names(model: nn.Module, cut: Iterable[nn.Module]) -> set[str]:
    """Return the names of buffers and frozen parameters outside of all blocks: every rank may read them."""
    in_blocks = {id(tensor) for block in cut for _, tensor in _tensors(block)}
    return {name for name, tensor in _tensors(model) if id(tensor) not in in_blocks and not tensor.requires_grad}


class Divided:
    """A model of which this rank keeps a part: the rest is on the meta device, where it takes no memory.

    The parameters that go are put aside, emptied, and are the ones that come back: who holds them (an optimizer, an
    ``nn.LSTM``, the user) has the trained values in the end.

    Args:
        model: the whole model.
        kept: the names of the tensors that stay.
    """

    def __init__(self, model: nn.Module, kept: set[str]) -> None:
        self.model = model
        self._aside: dict[int, Tensor] = {}  # by the id of what stands for it
        self._replaced: dict[int, Tensor] = {}  # the other way; shared ones stay shared
        for holder, name, path in _holders(model):
            tensor = _held(holder, name)
            if tensor is not None and not tensor.is_meta and path not in kept:
                _put(holder, name, self._stand_in(tensor))
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
        for _, _, tensor, path in _on_meta(self.model):
            if path in values and id(tensor) not in made:
                made[id(tensor)] = _like(tensor, values[path])
        return made

    @contextmanager
    def whole(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the model hold ``values``, by name, where it holds nothing, for a moment."""
        absent = [(holder, name, tensor) for holder, name, tensor, _ in _on_meta(self.model)]
        made = self.made_of(values)
        for holder, name, tensor in absent:
            _put(holder, name, made.get(id(tensor), tensor))
        try:
            yield
        finally:
            for holder, name, tensor in absent:
                _put(holder, name, tensor)

    def join(self, values: Mapping[str, Tensor]) -> None:
        """Make the model whole again with ``values``, by name; what is not among them is lost, and becomes NaN.

        Buffers that were kept take their value too: their owner may have changed it.
        """
        made: dict[int, Tensor] = {}
        for holder, name, tensor, path in _on_meta(self.model):
            if id(tensor) not in made:
                value = values[path] if path in values else _lost(tensor)
                original = self._aside.get(id(tensor))
                if original is None:  # this rank has never held it
                    original = _like(tensor, value)
                else:
                    original.data = value.detach().to(original.device)
                made[id(tensor)] = original
            _restore(holder, name, made[id(tensor)])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers(remove_duplicate=False):
                if name in values and values[name] is not buffer:
                    buffer.copy_(values[name])
        self._aside, self._replaced = {}, {}


@torch.no_grad()
def adopt(model: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the tensors of ``model`` these ``values``, by name; those on the meta device get memory on ``device``.

    Raises:
        ValueError: for a shape that is not the model's, on this rank.
    """
    made: dict[int, Tensor] = {}
    for holder, name, path in _holders(model):
        tensor = _held(holder, name)
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
            made[id(tensor)] = _like(tensor, value.to(device))
        _restore(holder, name, made[id(tensor)])


def move(model: nn.Module, names: set[str] | None, device: torch.device) -> None:
    """Move the tensors with these ``names`` (``None``: all) to ``device``, but for those on the meta device."""
    for name, tensor in _tensors(model):
        if not tensor.is_meta and (names is None or name in names):
            tensor.data = tensor.data.to(device)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(device)


@contextmanager
def without_meta(model: nn.Module) -> Iterator[None]:
    """Take what is on the meta device out of ``model`` for a moment: it cannot be moved."""
    absent = [(holder, name, tensor) for holder, name, tensor, _ in _on_meta(model)]
    for holder, name, _ in absent:
        _slot(holder, name)[name] = None
    try:
        yield
    finally:
        for holder, name, tensor in absent:
            _put(holder, name, tensor)


def tensors_of(model: nn.Module, names: set[str] | None = None) -> dict[str, Tensor]:
    """Return those of the tensors of ``model`` that are in memory, by name; all, or those with these ``names``."""
    return {name: t for name, t in _tensors(model) if not t.is_meta and (names is None or name in names)}


def tensors_named(model: nn.Module) -> set[str]:
    """Return the names of all tensors of ``model``."""
    return {name for name, _ in _tensors(model)}


def gather_everywhere(value: Any) -> list[Any]:
    """Return ``value`` of every rank, on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class OptimizerShare:
    """The part of an optimizer that updates this rank's parameters.

    The user's one optimizer is built over the whole model, so that its param groups come out as they were meant; then
    each rank takes the others' parameters out of the groups (which may become empty), and nothing else. Indices of
    parameters are those of the whole optimizer, in checkpoints too.

    Args:
        optimizer: over the parameters of the whole model.
        names: by ``id`` of a parameter, its name in the model.
        own: the names that this rank owns.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], own: set[str]) -> None:
        self.optimizer = optimizer
        self._names = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for group, group_names in zip(optimizer.param_groups, self._names, strict=True):
            others = [p for p, name in zip(group["params"], group_names, strict=True) if name not in own]
            group["params"] = [p for p, name in zip(group["params"], group_names, strict=True) if name in own]
            for parameter in others:  # Adagrad has a state for each from the start
                optimizer.state.pop(parameter, None)
        flat = [name for group_names in self._names for name in group_names]
        self._places = [place for place, name in enumerate(flat) if name in own]

    def state(self) -> dict[int, Any]:
        """Return the state of this rank's parameters, by their index in the whole optimizer."""
        return {self._places[i]: values for i, values in self.optimizer.state_dict()["state"].items()}

    def complete(self, everyone: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
        """Return the ``state_dict()`` of the whole optimizer, given :meth:`state` of every rank."""
        groups, start = [], 0
        for group, names in zip(self.optimizer.state_dict()["param_groups"], self._names, strict=True):
            groups.append({**group, "params": list(range(start, start + len(names)))})
            start += len(names)
        merged = {place: values for state in everyone for place, values in state.items()}
        return {"state": dict(sorted(merged.items())), "param_groups": groups}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Load a copy of this rank's part of the ``state_dict()`` of the whole optimizer."""
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**group, "params": mine["params"]} for group, mine in zip(state_dict["param_groups"], own, strict=True)
        ]
        state = state_dict["state"]
        local = {i: tree_map(_copied, state[place]) for i, place in enumerate(self._places) if place in state}
        self.optimizer.load_state_dict({"state": local, "param_groups": groups})

    def join(self, model: nn.Module, everyone: Sequence[Mapping[int, Any]] | None) -> None:
        """Have all parameters of ``model`` in the groups again, and the state of ``everyone``, where it is given."""
        whole = None if everyone is None else self.complete(everyone)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [parameters[name] for name in names]
        if whole is not None:
            self.optimizer.load_state_dict(whole)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _holders(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (module, name of the tensor in it, name of the tensor in ``model``)."""
    for prefix, module in list(model.named_modules()):  # one that is held twice must not be replaced twice
        for name in [*module._parameters, *module._buffers]:
            yield module, name, f"{prefix}.{name}" if prefix else name


def _on_meta(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, str]]:
    """Return (module, name of the tensor in it, the tensor, its name in ``model``)."""
    held = [(holder, name, _held(holder, name), path) for holder, name, path in _holders(model)]
    return [(holder, name, t, path) for holder, name, t, path in held if t is not None and t.is_meta]


def _slot(holder: nn.Module, name: str) -> dict[str, Any]:
    return holder._parameters if name in holder._parameters else holder._buffers


def _held(holder: nn.Module, name: str) -> Tensor | None:
    tensor: Tensor | None = _slot(holder, name)[name]
    return tensor


def _put(holder: nn.Module, name: str, tensor: Tensor) -> None:
    _slot(holder, name)[name] = tensor


def _restore(holder: nn.Module, name: str, tensor: Tensor) -> None:
    """Put it where it stays, and let a module know that keeps a list of its weights, as ``nn.LSTM`` does."""
    _put(holder, name, tensor)
    if isinstance(holder, nn.RNNBase):
        setattr(holder, name, tensor)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _lost(like: Tensor) -> Tensor:
    filled = torch.zeros(like.shape, dtype=like.dtype)
    return filled.fill_(float("nan")) if like.is_floating_point() or like.is_complex() else filled


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
