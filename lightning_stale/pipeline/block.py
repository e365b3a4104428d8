"""Consecutive layers, which one stage runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

Features = tuple[Any, ...]
"""The positional arguments of a block: what :mod:`~lightning_stale.pipeline.values.trees` can take apart."""


@dataclass(frozen=True)
class Block:
    """A module, and whether its result is a tuple of the next one's arguments (a traced model) or its one argument."""

    module: nn.Module
    spreads: bool = False

    def __call__(self, features: Features) -> Features:
        result = self.module(*features)
        return tuple(result) if self.spreads else (result,)
