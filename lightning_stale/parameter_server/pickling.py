"""Carry the user's optimizers to the server process, over tensors of its own.

Only rank 0 sends such bytes, through a pipe to the server that it has started itself; nothing that comes from the
network is unpickled.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.parameter_server.dense import dense_strides, memory_of
from lightning_stale.private import of_torch

# `step` is replaced on the instance by learning-rate schedulers and by the strategy; hooks stay with the worker.
_NOT_SENT = ("step", *of_torch.STEP_HOOKS)


class OptimizerPicklingError(TypeError):
    """An optimizer that cannot be sent to the parameter server."""


def dump_optimizers(
    optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], buffers: list[Tensor] | None = None
) -> bytes:
    """Return ``optimizers`` with their state as bytes; ``parameters`` are sent as their place in that list.

    Classes that are defined in the user's script travel by value (cloudpickle).

    Args:
        optimizers: the user's.
        parameters: of the model.
        buffers: gets the memory of the tensors in their state, to be sent beside the bytes, in which it is otherwise.

    Raises:
        OptimizerPicklingError: names the optimizer that cannot be sent, and why.
    """
    parts = []
    for optimizer in optimizers:
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, parameters, buffers).dump(optimizer)
        except Exception as error:
            raise OptimizerPicklingError(
                f"the optimizer {type(optimizer).__qualname__} cannot be sent to the parameter server: {error}. "
                "Its attributes and state must be picklable: keep locks, files and loggers out of it."
            ) from error
        parts.append(buffer.getvalue())
    return pickle.dumps(parts)


def load_optimizers(data: bytes, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> list[Optimizer]:
    """The inverse of :func:`dump_optimizers`, over other ``parameters`` of the same shapes.

    The tensors of their state stay in ``buffers``.
    """
    parts: list[bytes] = pickle.loads(data)
    return [_Unpickler(io.BytesIO(part), parameters, buffers).load() for part in parts]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, parameters: Sequence[Tensor], buffers: list[Tensor] | None) -> None:
        super().__init__(file)
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._buffers = buffers
        self._beside: dict[int, tuple[Any, ...]] = {}  # by id: what has gone into the buffers

    def persistent_id(self, obj: Any) -> int | tuple[Any, ...] | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) in self._places:
            return self._places[id(obj)]
        if self._buffers is None or type(obj) is not Tensor or obj.layout != torch.strided or obj.requires_grad:
            return None
        if obj.numel() == 0:
            return None
        if id(obj) not in self._beside:
            dtype = str(obj.dtype).removeprefix("torch.")
            self._beside[id(obj)] = (len(self._buffers), dtype, tuple(obj.shape), dense_strides(obj))
            self._buffers.append(memory_of(obj))
        return self._beside[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Optimizer):
            # torch's own __getstate__ drops what a subclass keeps outside of state and param_groups
            state = {name: value for name, value in vars(obj).items() if name not in _NOT_SENT}
            return _new, (type(obj),), state
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._parameters = parameters
        self._buffers = buffers
        self._beside: dict[int, Tensor] = {}

    def persistent_load(self, place: int | tuple[Any, ...]) -> Tensor:
        if isinstance(place, int):
            return self._parameters[place]
        index, dtype, shape, strides = place
        if index not in self._beside:
            self._beside[index] = self._buffers[index].view(getattr(torch, dtype)).as_strided(shape, strides)
        return self._beside[index]


def _new(cls: type[Optimizer]) -> Optimizer:
    optimizer = cls.__new__(cls)
    assert isinstance(optimizer, Optimizer)
    return optimizer


def compute_on_cpu(optimizers: Sequence[Optimizer]) -> None:
    """Switch off what torch offers for an accelerator only (``capturable``): the server computes on the CPU."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("capturable"):
                group["capturable"] = False
