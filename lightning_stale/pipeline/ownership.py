"""Which parameters a rank owns: the others are taken out of memory, and put back in the end, under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


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


def materialize(model: nn.Module, own: set[str], device: torch.device) -> None:
    """Give those tensors on the meta device that are ``own`` memory, and the values of ``reset_parameters()``.

    The values of the others are drawn as well, one module at a time, and dropped: with the same seed, all ranks
    together make the model that one process makes.

    Raises:
        ValueError: names a module without ``reset_parameters()``.
    """
    made: dict[int, Tensor] = {}  # shared ones stay shared
    for prefix, module in model.named_modules():
        held = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        held = {name: tensor for name, tensor in held.items() if tensor.is_meta}
        if not held:
            continue
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is None:
            raise ValueError(
                f"{prefix or type(model).__name__} ({type(module).__name__}) holds {next(iter(held))!r} on the meta "
                "device and has no reset_parameters() to give it a value: define it, or build it outside of "
                "torch.device('meta')"
            )
        for name, tensor in held.items():
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device=device)
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
            _holder(module, name)[name] = made[id(tensor)]
        reset()
        for name, tensor in held.items():
            if (f"{prefix}.{name}" if prefix else name) not in own:
                _holder(module, name)[name] = tensor
                made.pop(id(tensor), None)


def release_others(model: nn.Module, own: set[str]) -> None:
    """Put the parameters and buffers that are not ``own`` on the meta device, where they take no memory."""
    released: dict[int, nn.Parameter] = {}  # shared ones stay shared
    for holder, name, path in _holders(model):
        parameter, buffer = holder._parameters.get(name), holder._buffers.get(name)
        if path in own:
            continue
        if parameter is not None:
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            holder._parameters[name] = released.setdefault(id(parameter), empty)
        elif buffer is not None:
            holder._buffers[name] = torch.empty_like(buffer, device="meta")


def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the tensors on the meta device memory again, with ``values`` by name, or NaN where there is none.

    Buffers that were kept take their value too: their owner may have changed it.
    """
    restored: dict[int, nn.Parameter] = {}
    for holder, name, path in _holders(model):
        parameter, buffer = holder._parameters.get(name), holder._buffers.get(name)
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in restored:
                restored[id(parameter)] = nn.Parameter(_value(parameter, values.get(path)), parameter.requires_grad)
            holder._parameters[name] = restored[id(parameter)]
        elif buffer is not None and buffer.is_meta:
            holder._buffers[name] = _value(buffer, values.get(path))
        elif buffer is not None and path in values:
            buffer.copy_(values[path])


def own_values(model: nn.Module, own: set[str]) -> dict[str, Tensor]:
    """Return what is ``own``, by name, as copies on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model) if name in own}


def complete_state_dict(model: nn.Module, everyone: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return ``model.state_dict()``, with what other ranks own; ``everyone``: the :func:`own_values` of each."""
    found = {name: value for values in everyone for name, value in values.items()}
    return {name: found.get(name, value) for name, value in model.state_dict().items()}


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
            group["params"] = [p for p, name in zip(group["params"], group_names, strict=True) if name in own]
        flat = [name for group_names in self._names for name in group_names]
        self._places = [place for place, name in enumerate(flat) if name in own]

    def state(self) -> dict[int, Any]:
        """Return the state of this rank's parameters, by their index in the whole optimizer, on the CPU."""
        state = self.optimizer.state_dict()["state"]
        return {self._places[i]: _on_cpu(values) for i, values in state.items()}

    def complete(self, everyone: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
        """Return the ``state_dict()`` of the whole optimizer, given :meth:`state` of every rank."""
        groups, start = [], 0
        for group, names in zip(self.optimizer.state_dict()["param_groups"], self._names, strict=True):
            groups.append({**group, "params": list(range(start, start + len(names)))})
            start += len(names)
        merged = {place: values for state in everyone for place, values in state.items()}
        return {"state": dict(sorted(merged.items())), "param_groups": groups}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Load this rank's part of the ``state_dict()`` of the whole optimizer."""
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**group, "params": mine["params"]} for group, mine in zip(state_dict["param_groups"], own, strict=True)
        ]
        state = state_dict["state"]
        local = {i: state[place] for i, place in enumerate(self._places) if place in state}
        self.optimizer.load_state_dict({"state": local, "param_groups": groups})

    def join(self, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Make it the whole optimizer again, over the parameters of ``model``, with ``state_dict``."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [parameters[name] for name in names]
        self.optimizer.state.clear()
        self.optimizer.load_state_dict(dict(state_dict))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _holders(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (module, name of the tensor in it, name of the tensor in ``model``)."""
    for prefix, module in list(model.named_modules()):  # one that is held twice must not be replaced twice
        for name in [*module._parameters, *module._buffers]:
            yield module, name, f"{prefix}.{name}" if prefix else name


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def _value(like: Tensor, value: Tensor | None) -> Tensor:
    if value is not None:
        return value.clone()
    filled = torch.zeros(like.shape, dtype=like.dtype)
    return filled.fill_(float("nan")) if like.is_floating_point() else filled


def _on_cpu(values: Any) -> Any:
    return {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in values.items()}
