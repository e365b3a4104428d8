"""The local model as flat tensors, one per data type, so that a round is a few large collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Flat:
    """All parameters of one data type, one after the other."""

    parameters: list[Tensor]
    weights: Tensor
    """The global weights ``W``."""
    launched: Tensor
    """The replica as it was at the launch of this round."""
    change: Tensor
    """``D``: the local change that is, or was last, on its way; its sum over the ranks once it has arrived."""

    def read(self) -> Tensor:
        """Return the replica ``x`` as it is now."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def write(self, values: Tensor) -> None:
        """Make ``values`` the replica."""
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(values, sizes), strict=True):
            parameter.copy_(part.view_as(parameter))

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return ``flat`` as tensors of the parameters' shapes."""
        sizes = [parameter.numel() for parameter in self.parameters]
        return [part.view(p.shape) for p, part in zip(self.parameters, torch.split(flat, sizes), strict=True)]


def flatten(parameters: Sequence[Tensor]) -> list[Flat]:
    """Return one :class:`Flat` per data type, over ``parameters`` in their order."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.dtype, []).append(parameter)
    flats = []
    for same in kinds.values():
        values = torch.cat([parameter.detach().reshape(-1) for parameter in same])
        flats.append(Flat(same, values, values.clone(), torch.zeros_like(values)))
    return flats
