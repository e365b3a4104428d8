"""Each rule beside its reference, and how its pushes get to a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stale import ApplyRule, Dana, DelayCompensated, Plain, Ringmaster, Scaled
from tests.unit.apply import reference
from tests.unit.apply.reference import PARTS, SHAPES

CASES: dict[str, tuple[Callable[[], ApplyRule], Callable[[], reference.Master]]] = {
    "plain": (Plain, reference.plain),
    "ringmaster": (lambda: Ringmaster(R=4), lambda: reference.ringmaster(4)),
    "ringmaster by workers": (Ringmaster, lambda: reference.ringmaster(2 * reference.WORKERS)),
    "delay-compensated": (lambda: DelayCompensated(0.7, adaptive=False), lambda: reference.delay_compensated(0.7)),
    "delay-compensated, adaptive": (DelayCompensated, lambda: reference.delay_compensated_adaptive(2.0)),
    "dana": (lambda: Dana(momentum=0.6), lambda: reference.dana(0.6)),
    "scaled": (Scaled, reference.scaled),
}


def tensors(vector: Any) -> list[Tensor]:
    """Return the parameters that a vector of the reference stands for."""
    return [torch.tensor(vector[part]).reshape(shape) for part, shape in zip(PARTS, SHAPES, strict=True)]


def vector(parameters: Any) -> Any:
    """The inverse of :func:`tensors`."""
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in parameters])
