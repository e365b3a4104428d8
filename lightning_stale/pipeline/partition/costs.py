"""What a layer costs: by its parameters, or by the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_stale.pipeline.values.strides import copied
from lightning_stale.pipeline.values.trees import map_tensors, tensors


def count_parameters(module: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure_layers(
    body: nn.Sequential,
    example: Any,
    repetitions: int = 5,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Return the seconds of forward and backward of each child, the least of ``repetitions``; nothing is changed.

    Args:
        body: its children run one after the other.
        example: the input of the first.
        repetitions: how often.
        context: entered around each forward (autocast, say).
    """
    buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
    gradients = [parameter.grad for parameter in body.parameters()]
    for parameter in body.parameters():
        parameter.grad = None  # or else what is there would be added to
    times = [float("inf")] * len(body)
    with torch.random.fork_rng():
        for _ in range(repetitions):
            x = example
            for i, layer in enumerate(body):
                x = map_tensors(_leaf, x)
                given = map_tensors(copied, x)  # an in-place layer must not change a leaf, or what comes again
                started = time.perf_counter()
                with context():
                    y = layer(given)
                outputs = [tensor for tensor in tensors(y) if tensor.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[i] = min(times[i], time.perf_counter() - started)
                x = y
    for parameter, gradient in zip(body.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for name, buffer in body.named_buffers():
            buffer.copy_(buffers[name])
    return times


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
