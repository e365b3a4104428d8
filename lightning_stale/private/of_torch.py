"""Reaches into private parts of torch (read in 2.13); a test fails when one of them moves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store, _abort_process_group, _get_default_store
from torch.optim import Optimizer
from torch.utils._pytree import SUPPORTED_NODES
from torch.utils._pytree import tree_map as tree_map

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
"""Where an optimizer has the hooks that are called around its steps."""

Node = tuple[Callable[[Any], tuple[Iterable[Any], Any]], Callable[[list[Any], Any], Any]]


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Have autograd take ``tensors`` for what they were when their version counters stood at ``versions``."""
    if tensors:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def subtract_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each of ``tensors``, in place, its other one; on a GPU, in one kernel for all."""
    torch._foreach_sub_(tensors, others)


def copy_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Copy into each of ``tensors`` its other one; on a GPU, in one kernel for all."""
    torch._foreach_copy_(tensors, others)


def replace_step(optimizer: Optimizer, push: Callable[[], None]) -> Callable[[], None]:
    """Let ``optimizer.step(closure)`` run closure and ``push`` between the user's step hooks; return what undoes it.

    Learning-rate schedulers wrap ``step`` of the object, and warn where they find that somebody else has; a fused
    optimizer tells a gradient scaler that it unscales by itself, but its kernel does not run here.
    """

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        push()
        self._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        return result

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    replaced = ("step", "_step_supports_amp_scaling")
    before = {name: value for name, value in vars(optimizer).items() if name in replaced}
    optimizer.step = MethodType(Optimizer.profile_hook_step(step), optimizer)  # type: ignore[method-assign]
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def undo() -> None:
        for name in replaced:
            optimizer.__dict__.pop(name, None)
        optimizer.__dict__.update(before)

    return undo


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm of any kind, which ``sync_batchnorm=True`` would make one over all ranks."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def registered_node(kind: type) -> Node | None:
    """Return (flatten, unflatten) of a class that is registered with torch's pytrees, or ``None``."""
    node = SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


def rendezvous_store() -> Store:
    """Return the key-value store over which the ranks have found each other."""
    return _get_default_store()


def shared_store() -> Store:
    """Return the same without the prefix of a process group: whichever group a rank is in, it is one for all."""
    store = rendezvous_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def form_default_group(backend: str, store: Store, prefix: str, index: int, size: int, timeout: timedelta) -> None:
    """Make the default process group anew, where there is none, over keys of ``store`` that begin with ``prefix``.

    torch prefixes the tracebacks of a process with its rank in each group that it makes; the first prefix stays.
    """
    hook = sys.excepthook
    try:
        torch.distributed.init_process_group(
            backend, store=PrefixStore(prefix, store), rank=index, world_size=size, timeout=timeout
        )
    finally:
        sys.excepthook = hook


def abort_collectives() -> None:
    """Make the collectives fail that this process waits in; gloo's do by themselves when a rank is gone."""
    if torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend():
        _abort_process_group()


def is_lost_connection(exception: BaseException) -> bool:
    """Whether a collective has failed, mostly because another rank is gone; gloo raises a plain ``RuntimeError``."""
    return isinstance(exception, torch.distributed.DistError) or (
        isinstance(exception, RuntimeError) and "gloo/" in str(exception)
    )


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return autograd's version counter of each of ``tensors``: it rises when one is changed in place."""
    return [tensor._version for tensor in tensors]


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows ``tensor`` as a view of another one."""
    return tensor._is_view()


def uncoalesced(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a sparse tensor as they are: the same index may come twice."""
    return tensor._indices(), tensor._values()
