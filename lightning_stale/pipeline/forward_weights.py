"""The weights that a forward has used, there again while its graph goes backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_stale.private.of_torch import set_versions, versions_of


class ForwardWeights:
    """A copy of a block's weights as its forward has left them.

    A forward without a backward at once runs on the very parameters, whichever way it reaches them, and its graph holds
    their memory. Before the backward that memory gets the old values, and afterwards those of now: what autograd has
    saved, what a function of the user's has noted and what a checkpoint computes again all belong together.

    Args:
        module: the block, after the forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._versions = versions_of(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the old values in the parameters; once only.

        Raises:
            RuntimeError: if the backward changes a parameter.
        """
        versions = versions_of(self._parameters)
        self._exchange()
        set_versions(self._parameters, self._versions)
        try:
            yield
            if versions_of(self._parameters) != self._versions:
                raise RuntimeError(
                    "a backward changed the weights (an optimizer's step in a hook?), which recompute=False cannot "
                    "follow: write DSPStrategy(recompute=True)"
                )
        finally:
            self._exchange()
            set_versions(self._parameters, versions)

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, values in zip(self._parameters, self._values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(values)
            values.copy_(held)
