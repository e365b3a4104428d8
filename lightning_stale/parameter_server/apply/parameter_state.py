"""What a rule remembers per parameter, and the numbers that it computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Key = tuple[int, ...]


class ParameterState:
    """A tensor per key, zero at first; made when it is first asked for."""

    def __init__(self) -> None:
        self._tensors: dict[Key, Tensor] = {}

    def at(self, key: Key, like: Tensor) -> Tensor:
        """Return the tensor of ``key``, with the shape and dtype of ``like``."""
        if key not in self._tensors:
            self._tensors[key] = torch.zeros_like(like)
        return self._tensors[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, by their keys with dots."""
        return {".".join(map(str, key)): tensor for key, tensor in self._tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], keep: Callable[[Key], bool] = lambda _: True) -> None:
        """Take copies of the tensors whose keys are to be kept."""
        keys = {tuple(map(int, name.split("."))): tensor for name, tensor in state.items()}
        self._tensors = {key: tensor.clone() for key, tensor in keys.items() if keep(key)}


def real(tensor: Tensor) -> Tensor:
    """Return the numbers of ``tensor`` as real ones of at least 32 bits: a view, or a copy where they have 16.

    Sums over many steps, and squares of small gradients, are lost in 16 bits. A complex number is taken for two real
    ones, as torch's optimizers do.
    """
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def put(values: Tensor, into: Tensor) -> None:
    """Have ``values``, which :func:`real` gave for ``into`` and which have changed since, in ``into``."""
    if values.dtype != into.dtype and not into.is_complex():
        into.copy_(values)
