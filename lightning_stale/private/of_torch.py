"""Reaches into private parts of torch (read in 2.13); a test fails when one of them moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store, _abort_process_group, _get_default_store
from torch.utils._pytree import SUPPORTED_NODES
from torch.utils._pytree import tree_map as tree_map

Node = tuple[Callable[[Any], tuple[Iterable[Any], Any]], Callable[[list[Any], Any], Any]]


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Have autograd take ``tensors`` for what they were when their version counters stood at ``versions``."""
    if tensors:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def registered_node(kind: type) -> Node | None:
    """Return (flatten, unflatten) of a class that is registered with torch's pytrees, or ``None``."""
    node = SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


def rendezvous_store() -> Store:
    """Return the key-value store over which the ranks have found each other."""
    return _get_default_store()


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
