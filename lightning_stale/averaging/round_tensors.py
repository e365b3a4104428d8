"""What a round keeps beside the local model: flat tensors per data type, so that it is a few large operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stale.averaging.merge import Merge
from lightning_stale.private import of_torch


@dataclass
class Buffer:
    """A value for each parameter, one after the other."""

    flat: Tensor
    parts: list[Tensor]
    """Views of ``flat``, of the parameters' shapes."""


class RoundTensors:
    """All parameters of one data type, the replica ``x``, and what a round keeps of them.

    Nothing is allocated after this: on two cores, the page faults of fresh tensors took as long as the sums.

    Args:
        parameters: the replica ``x``, which the inner optimizer changes; of any memory layout.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)  # themselves: an optimizer may give one other memory (`p.data = ...`)
        self.weights = self._buffer()
        """The global weights ``W``."""
        self.launched = self._buffer()
        """The replica as it was at the launch of this round."""
        self.change = self._buffer()
        """``D``: the local change that is, or was last, on its way; its sum over the ranks once it has arrived."""
        self.change.flat.zero_()

    def take_change(self) -> None:
        """Make ``change`` what the replica has changed by since the launch; ``launched`` is overwritten."""
        of_torch.subtract_each(self.launched.parts, self.parameters)
        self.launched, self.change = self.change, self.launched

    def go_on(self, merge: Merge | None) -> None:
        """Begin a round, from the merged weights, or from where the replica is (``None``)."""
        if merge is None:
            of_torch.copy_each(self.launched.parts, self.parameters)
        else:
            merge(self.weights.flat, self.change.flat, self.launched.flat)
            of_torch.copy_each(self.parameters, self.launched.parts)

    def _buffer(self) -> Buffer:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return Buffer(flat, [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)])


def by_type(parameters: Sequence[Tensor]) -> list[RoundTensors]:
    """Return one :class:`RoundTensors` per data type, over ``parameters`` in their order."""
    types: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        types.setdefault(parameter.dtype, []).append(parameter)
    return [RoundTensors(same) for same in types.values()]
