"""Notes when a stage of DSP waits for its neighbours, by a clock that all processes of a host share.

Also for ``tests/integration/test_simulation.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_stale.pipeline.channels.process import ReceiveChannel, SendChannel

What = Literal["features", "gradients"]


class Message(NamedTuple):
    """One end of a message between two stages."""

    what: What
    sent: bool
    batch: int
    began: float
    """When the stage was about to send, or asked."""
    ended: float
    """When it went on."""


@contextmanager
def messages(rank: int) -> Iterator[list[Message]]:
    """Enter a list that gets all messages of this process; the last stage is on rank 0, the first on the highest."""
    found: list[Message] = []
    send, receive = SendChannel.send, ReceiveChannel.receive

    def note(channel: Any, sent: bool, batch: int, began: float) -> None:
        onwards = (channel._peer < rank) == sent
        if batch >= 0:  # below 0: no batch follows
            found.append(Message("features" if onwards else "gradients", sent, batch, began, time.monotonic()))

    def timed_send(self: SendChannel, batch: int, value: Any) -> None:
        began = time.monotonic()
        send(self, batch, value)
        note(self, True, batch, began)

    def timed_receive(self: ReceiveChannel, batch: int) -> Any:
        began = time.monotonic()
        value = receive(self, batch)
        note(self, False, batch, began)
        return value

    SendChannel.send, ReceiveChannel.receive = timed_send, timed_receive  # type: ignore[method-assign]
    try:
        yield found
    finally:
        SendChannel.send, ReceiveChannel.receive = send, receive  # type: ignore[method-assign]


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SleepingStage) -> Tensor:
        ctx.layer = layer
        began = time.monotonic()
        time.sleep(layer.forward_s)
        layer.forwards.append((began, time.monotonic()))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        began = time.monotonic()
        time.sleep(ctx.layer.backward_s)
        ctx.layer.backwards.append((began, time.monotonic()))
        return gradient, None


class SleepingStage(nn.Module):
    """Takes the time of an accelerator, and no core; keeps when."""

    def __init__(self, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.forward_s, self.backward_s = forward_s, backward_s
        self.forwards: list[tuple[float, float]] = []
        self.backwards: list[tuple[float, float]] = []
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(self.linear(x), self)
