"""Module buffers: each worker has its own while training runs, and all have the same at a meeting point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.private import of_modules, of_torch

_Agreed = list[tuple[Tensor, Tensor]]
"""Tensors, and what they are to become."""


def agree_on_buffers(model: nn.Module, world_size: int) -> None:
    """Average the running statistics of norm layers over the ranks; give all other buffers the values of rank 0.

    Batch norm's mean and variance are averaged elementwise, as is usual in local SGD and parameter-server training;
    counters, tables and queues cannot be averaged, and get rank 0's values as in DDP.
    """
    _assume(_agreed_buffers(model, world_size))


@torch.no_grad()
def _agreed_buffers(model: nn.Module, world_size: int) -> _Agreed:
    if world_size == 1:
        return []
    statistics = {
        id(buffer)
        for module in model.modules()
        if of_modules.keeps_statistics(module)
        for buffer in (module.running_mean, module.running_var)
        if isinstance(buffer, Tensor)
    }

    def average(flat: Tensor) -> None:
        torch.distributed.all_reduce(flat)
        flat.div_(world_size)

    def adopt(flat: Tensor) -> None:
        torch.distributed.broadcast(flat, src=0)

    return [
        *_in_one(average, (buffer for buffer in model.buffers() if id(buffer) in statistics)),
        *_in_one(adopt, (buffer for buffer in model.buffers() if id(buffer) not in statistics)),
    ]


class UntrainedState:
    """What of a model no optimizer trains: its buffers, and parameters that somebody may change all the same.

    Args:
        model: the model.
        optimizers: those that train it.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self._model = model
        self._parameters = [Versioned(p) for p in model.parameters() if id(p) not in trained]

    @property
    def empty(self) -> bool:
        """Whether there is nothing of the kind."""
        return not self._parameters and not any(True for _ in self._model.buffers())

    def agreed(self, world_size: int) -> Callable[[], None]:
        """Find out, with all ranks, what is to be the same on all; return what makes it so here."""
        buffers = _agreed_buffers(self._model, world_size)
        changed, parameters = _agreed_parameters(self._parameters, world_size)

        def assume() -> None:
            _assume([*buffers, *parameters])
            for parameter in changed:
                parameter.settle()

        return assume


class Versioned:
    """A parameter that no optimizer trains, and whether somebody has changed it since the last look."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._version = of_torch.versions_of([parameter])[0]

    def changed(self) -> bool:
        """Return whether it was changed in place since the last :meth:`settle`."""
        return of_torch.versions_of([self.parameter])[0] != self._version

    def settle(self) -> None:
        """Take it as it is now."""
        self._version = of_torch.versions_of([self.parameter])[0]


@torch.no_grad()
def _agreed_parameters(parameters: Sequence[Versioned], world_size: int) -> tuple[list[Versioned], _Agreed]:
    """Return parameters that no optimizer trains, and that some rank has changed, with the values of rank 0.

    An example is a teacher that follows the model by moving averages; frozen weights are not sent.
    """
    if world_size == 1 or not parameters:
        return [], []
    device = parameters[0].parameter.device
    flags = torch.tensor([parameter.changed() for parameter in parameters], dtype=torch.uint8, device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    changed = [parameter for parameter, flag in zip(parameters, flags.tolist(), strict=True) if flag]
    agreed = [(parameter.parameter.data, parameter.parameter.data.clone()) for parameter in changed]
    for _, values in agreed:
        torch.distributed.broadcast(values, src=0)
    return changed, agreed


def _in_one(collective: Callable[[Tensor], None], buffers: Iterable[Tensor]) -> _Agreed:
    """Run ``collective`` once per device and dtype, on copies of ``buffers`` of that kind one after the other."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for buffer in buffers:
        kinds[buffer.device, buffer.dtype].append(buffer)
    agreed: _Agreed = []
    for same in kinds.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        collective(flat)
        parts = torch.split(flat, [buffer.numel() for buffer in same])
        agreed += [(buffer, values.view_as(buffer)) for buffer, values in zip(same, parts, strict=True)]
    return agreed


@torch.no_grad()
def _assume(agreed: _Agreed) -> None:
    for tensor, values in agreed:
        tensor.copy_(values)
