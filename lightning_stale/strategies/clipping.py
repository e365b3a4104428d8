"""Clip gradients in a way of our own, through the seam that Lightning has for it: the precision plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim import Optimizer

Clip = Callable[[Optimizer, float, GradClipAlgorithmType], None]
"""(optimizer, value > 0, algorithm); the optimizer may be Lightning's wrapper of it."""


def clipping_with(plugin: Precision, clip: Clip) -> Precision:
    """Return a plugin that is ``plugin`` in everything but that ``clip`` clips gradients.

    It shares the state of ``plugin`` (a gradient scaler, say), and has the name of its class, under which that state is
    in checkpoints.
    """
    kind = type(plugin)

    def clip_gradients(
        _: Precision,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0:
            clip(optimizer, float(clip_val), GradClipAlgorithmType(gradient_clip_algorithm))

    names: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "clip_gradients": clip_gradients,
    }
    derived = type(kind.__name__, (kind,), names)
    made: Precision = object.__new__(derived)
    made.__dict__ = plugin.__dict__
    return made
