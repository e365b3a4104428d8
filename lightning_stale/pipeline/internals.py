"""Reaches into private parts of torch (read in 2.13) that the pipeline needs; a test fails when one of them moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES

Node = tuple[Callable[[Any], tuple[Iterable[Any], Any]], Callable[[list[Any], Any], Any]]


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Have autograd take ``tensors`` for what they were when their version counters stood at ``versions``."""
    if tensors:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def registered_node(kind: type) -> Node | None:
    """Return (flatten, unflatten) of a class that is registered with torch's pytrees, or ``None``."""
    node = SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)
