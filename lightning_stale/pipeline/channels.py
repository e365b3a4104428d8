"""How features and gradients move between two stages: in memory, or by torch.distributed.

A sender is never blocked while fewer messages wait than the queue is long, and a receiver finds what has arrived: each
direction of a pair of stages has its own process group, and a thread on either side that sends or receives while the
stage computes.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.pipeline import strides
from lightning_stale.pipeline.values import Tree, put_together, take_apart

_POLL_S = 0.5
_HEADER = 3  # int64: batch, length of the description (0: as before), what kind of message
_DATA, _CLOSE = 0, 1


class ChannelError(RuntimeError):
    """The neighbouring stage is gone, or has sent something else than this one expects."""


class Channel(ABC):
    """One direction between two stages: first in, first out; every message carries its batch."""

    @abstractmethod
    def send(self, batch: int, value: Any) -> None:
        """Send ``value``, a tree of tensors and plain values; wait only while the queue is full."""

    @abstractmethod
    def receive(self, batch: int) -> Any:
        """Return the next value, which must be that of ``batch``.

        Raises:
            ChannelError: if it is not, or the neighbour has ended.
        """

    @abstractmethod
    def close(self) -> None:
        """Send and receive no more."""

    def widen(self, length: int) -> None:  # noqa: B027
        """Let so many more messages wait to be received."""

    def join(self, timeout: float) -> None:  # noqa: B027
        """Wait, after :meth:`close`, until nothing of it runs any more, at most ``timeout`` seconds."""


class MemoryChannel(Channel):
    """Between two stages of one process."""

    def __init__(self) -> None:
        self._messages: deque[tuple[int, Any]] = deque()

    def send(self, batch: int, value: Any) -> None:
        self._messages.append((batch, value))

    def receive(self, batch: int) -> Any:
        return _checked(batch, *self._messages.popleft())

    def close(self) -> None:
        self._messages.clear()


class SendChannel(Channel):
    """The sending end between two processes.

    Args:
        peer: the other's global rank.
        group: a process group of the two, for this direction alone.
        length: how many messages may wait to be received before :meth:`send` waits.
        device: where the tensors are.
        check: called now and then while waiting, and with True where the peer has ended; raises to break off.
    """

    def __init__(
        self, peer: int, group: dist.ProcessGroup, length: int, device: torch.device, check: Callable[[bool], None]
    ) -> None:
        self._peer, self._group, self._device, self._check = peer, group, device, check
        self._length = length
        self._outbox: queue.Queue[tuple[int, bytes, list[Tensor], Any] | None] = queue.Queue()
        self._unsent = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._described: bytes = b""
        self._thread = threading.Thread(target=self._run, name=f"send-to-{peer}", daemon=True)
        self._thread.start()

    def send(self, batch: int, value: Any) -> None:
        tree, tensors = take_apart(value)
        description = msgpack.packb(
            [tree, [_describe(tensor) for tensor in tensors]], use_bin_type=True, strict_types=True
        )
        with self._changed:
            self._unsent += 1
        self._outbox.put((batch, description, tensors, _recorded_event(self._device)))
        with self._changed:
            while self._unsent > self._length and self._error is None and batch >= 0:  # below 0: no batch follows
                if not self._changed.wait(_POLL_S):
                    self._check(False)
        if self._error is not None:
            self._check(True)
            raise ChannelError(f"rank {self._peer} cannot be sent to: {self._error}") from self._error

    def receive(self, batch: int) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self._outbox.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                batch, description, tensors, event = message
                if event is not None:
                    event.synchronize()
                self._send(batch, description, tensors)
                with self._changed:
                    self._unsent -= 1
                    self._changed.notify_all()
            self._put(torch.tensor([0, 0, _CLOSE]))
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send(self, batch: int, description: bytes, tensors: list[Tensor]) -> None:
        new = description != self._described
        self._described = description
        self._put(torch.tensor([batch, len(description) if new else 0, _DATA]))
        if new:
            self._put(torch.frombuffer(bytearray(description), dtype=torch.uint8))
        for tensor in tensors:
            if tensor.numel() > 0:
                self._put(strides.flat(tensor).view(torch.uint8))

    def _put(self, tensor: Tensor) -> None:
        dist.send(tensor.to(self._device), self._peer, self._group)


class ReceiveChannel(Channel):
    """The receiving end between two processes; arguments as for :class:`SendChannel`."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, length: int, device: torch.device, check: Callable[[bool], None]
    ) -> None:
        self._peer, self._group, self._device, self._check = peer, group, device, check
        self._inbox: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._room = threading.Semaphore(length)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"receive-from-{peer}", daemon=True)
        self._thread.start()

    def send(self, batch: int, value: Any) -> None:
        raise NotImplementedError

    def receive(self, batch: int) -> Any:
        self._room.release()  # for this one, besides the `length` that may wait
        while True:
            try:
                got, value = self._inbox.get(timeout=_POLL_S)
            except queue.Empty:
                ended = self._error is not None and self._inbox.empty()
                self._check(ended)
                if ended:
                    raise ChannelError(f"rank {self._peer} has ended: {self._error}") from self._error
                continue
            return _checked(batch, got, value)

    def widen(self, length: int) -> None:
        if length > 0:
            self._room.release(length)

    def close(self) -> None:
        self._room.release()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        tree: Tree = []
        described: list[list[Any]] = []
        try:
            while True:
                self._room.acquire()
                batch, length, kind = self._get(torch.int64, [_HEADER]).tolist()
                if kind == _CLOSE:
                    raise ChannelError("it has closed the channel")
                if length:
                    packed = self._get(torch.uint8, [length]).cpu().numpy().tobytes()
                    tree, described = msgpack.unpackb(packed, raw=False)
                tensors = [self._tensor(*description) for description in described]
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                self._inbox.put((batch, put_together(tree, tensors)))
        except Exception as error:
            self._error = error

    def _tensor(self, dtype: str, shape: list[int], stride: list[int], on_cpu: bool, requires_grad: bool) -> Tensor:
        kind = getattr(torch, dtype)
        if 0 in shape:
            tensor = torch.empty_strided(shape, stride, dtype=kind, device=self._device)
        else:
            elements = self._get(torch.uint8, [strides.flat_size(shape, stride) * kind.itemsize]).view(kind)
            tensor = strides.restored(elements, shape, stride)
        if on_cpu:  # the lengths of a packed sequence, say, while the features are on a GPU
            tensor = tensor.cpu()
        return tensor.detach().requires_grad_(requires_grad)

    def _get(self, dtype: torch.dtype, shape: list[int]) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, self._peer, self._group)
        return tensor


def _describe(tensor: Tensor) -> list[Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [dtype, list(tensor.shape), list(tensor.stride()), tensor.device.type == "cpu", tensor.requires_grad]


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _checked(expected: int, batch: int, value: Any) -> Any:
    if batch != expected and min(batch, expected) < 0:
        counts = ["another one" if n >= 0 else f"{-1 - n} batches and no more" for n in (expected, batch)]
        raise ChannelError(
            f"the loaders of neighbouring stages end differently: {counts[0]} on this rank, {counts[1]} on the other "
            "one. All stages together are one replica: yield the same batches on every rank"
        )
    if batch != expected:
        raise ChannelError(f"a message of batch {batch} where that of batch {expected} was expected")
    return value
