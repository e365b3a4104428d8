"""How features and gradients move between two stages: in memory, or by torch.distributed.

A sender is never blocked while fewer messages wait than the queue is long, and a receiver finds what has arrived: each
direction of a pair of stages has its own process group, and a thread on either side that sends or receives while the
stage computes. Nothing here has a time limit: a neighbour may validate for hours. Whether it still lives is for
``check`` to say.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.pipeline import strides
from lightning_stale.pipeline.transfer import GlooTransfer, Transfer, get, put
from lightning_stale.pipeline.values import Tree, put_together, take_apart
from lightning_stale.transport.groups import break_off

_POLL_S = 0.5
_BREAK_OFF_S = 10.0
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

    def close(self) -> None:  # noqa: B027
        """Send no more than what waits to be sent; receive no more, and let the sender come to its end."""

    def widen(self, length: int) -> None:  # noqa: B027
        """Let so many more messages wait to be received."""

    def join(self, timeout: float) -> bool:
        """Wait, after :meth:`close`, until nothing of it runs any more, at most ``timeout`` seconds; say whether."""
        return True

    def break_off(self) -> None:  # noqa: B027
        """Let the thread end at once; the neighbour's ends too."""


class MemoryChannel(Channel):
    """Between two stages of one process."""

    def __init__(self) -> None:
        self._messages: deque[tuple[int, Any]] = deque()

    def send(self, batch: int, value: Any) -> None:
        self._messages.append((batch, value))

    def receive(self, batch: int) -> Any:
        return _checked(batch, *self._messages.popleft())


class _LinkedChannel(Channel):
    """One end between two processes, with its thread.

    Args:
        peer: the other's global rank.
        group: a process group of the two over gloo, for this direction alone.
        length: how many messages may wait to be received before :meth:`send` waits.
        device: where the tensors are.
        check: called now and then while waiting, and with True where the peer has ended; raises to break off.
        transfer: how tensors move; by default through ``group``.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        length: int,
        device: torch.device,
        check: Callable[[bool], None],
        transfer: Transfer | None = None,
    ) -> None:
        self._peer, self._group, self._length, self._device, self._check = peer, group, length, device, check
        self._transfer = GlooTransfer(peer, device, group) if transfer is None else transfer
        self._error: BaseException | None = None
        self._prepare()
        self._thread = threading.Thread(target=self._run, name=f"{type(self).__name__}-{peer}", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def break_off(self) -> None:
        break_off(self._group)
        self._transfer.break_off()

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the thread needs."""

    @abstractmethod
    def _run(self) -> None: ...


class SendChannel(_LinkedChannel):
    """The sending end between two processes; arguments as for :class:`_LinkedChannel`."""

    def _prepare(self) -> None:
        self._outbox: queue.Queue[tuple[int, bytes, list[Tensor], Any] | None] = queue.Queue()
        self._unsent = 0
        self._changed = threading.Condition()
        self._described: bytes = b""

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

    def break_off(self) -> None:
        self._outbox.put(None)
        super().break_off()

    def _run(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._send(*message)
                del message  # which may be large, and the next one may take long
                with self._changed:
                    self._unsent -= 1
                    self._changed.notify_all()
            put(torch.tensor([0, 0, _CLOSE]), self._peer, self._group)
        except Exception as error:
            with self._changed:
                self._error = _without_frames(error)
                self._changed.notify_all()

    def _send(self, batch: int, description: bytes, tensors: list[Tensor], ready: torch.cuda.Event | None) -> None:
        new = description != self._described
        self._described = description
        put(torch.tensor([batch, len(description) if new else 0, _DATA]), self._peer, self._group)
        if new:
            put(torch.frombuffer(bytearray(description), dtype=torch.uint8), self._peer, self._group)
        with self._transfer.sending(ready) as send:
            for tensor in tensors:
                if tensor.numel() > 0:
                    send(strides.flat(tensor.to(self._device)).view(torch.uint8))


class ReceiveChannel(_LinkedChannel):
    """The receiving end between two processes; arguments as for :class:`_LinkedChannel`."""

    def _prepare(self) -> None:
        self._inbox: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._room = threading.Semaphore(self._length)
        self._closing = False

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
            _use_on_current_stream(value, self._device)
            return _checked(batch, got, value)

    def widen(self, length: int) -> None:
        if length > 0:
            self._room.release(length)

    def close(self) -> None:
        self._closing = True
        self._room.release()

    def break_off(self) -> None:
        self.close()
        super().break_off()

    def _run(self) -> None:
        tree: Tree = []
        described: list[list[Any]] = []
        try:
            while True:
                if not self._closing:
                    self._room.acquire()
                batch, length, kind = get(torch.empty(_HEADER, dtype=torch.int64), self._peer, self._group).tolist()
                if kind == _CLOSE:
                    raise ChannelError("it has closed the channel")
                if length:
                    packed = get(torch.empty(length, dtype=torch.uint8), self._peer, self._group).numpy().tobytes()
                    tree, described = msgpack.unpackb(packed, raw=False)
                with self._transfer.receiving() as receive:
                    tensors = [self._tensor(receive, *description) for description in described]
                if not self._closing:
                    self._inbox.put((batch, put_together(tree, tensors)))
                del tensors
        except Exception as error:
            self._error = _without_frames(error)

    def _tensor(
        self,
        receive: Callable[[Tensor], None],
        dtype: str,
        shape: list[int],
        stride: list[int],
        on_cpu: bool,
        requires_grad: bool,
    ) -> Tensor:
        kind = getattr(torch, dtype)
        if 0 in shape:
            tensor = torch.empty_strided(shape, stride, dtype=kind, device=self._device)
        else:
            elements = self._transfer.empty([strides.flat_size(shape, stride) * kind.itemsize], torch.uint8)
            receive(elements)
            with self._transfer.on_stream():
                tensor = strides.restored(elements.view(kind), shape, stride)
        if on_cpu:  # the lengths of a packed sequence, say, while the features are on a GPU
            with self._transfer.on_stream():
                tensor = tensor.cpu()
        return tensor.detach().requires_grad_(requires_grad)


def end(channels: Iterable[Channel], check: Callable[[], object]) -> None:
    """End ``channels`` once everything has been sent, and the neighbours have ended theirs.

    Args:
        channels: of this process.
        check: called now and then while waiting; raises to break off.
    """
    channels = list(channels)
    try:
        for channel in channels:
            channel.close()
        for channel in channels:
            while not channel.join(_POLL_S):
                check()
    finally:
        break_off_all(channels)


def break_off_all(channels: Iterable[Channel]) -> None:
    """End those of ``channels`` at once that have not ended."""
    for channel in channels:
        if not channel.join(0.0):
            channel.break_off()
            channel.join(_BREAK_OFF_S)


def _without_frames(error: Exception) -> Exception:
    """Return it without what refers to the channel that keeps it, and to the group under it.

    A group in a cycle goes at some garbage collection, which may be in a forked process, such as a loader's worker:
    there its threads do not exist, and their end is a crash.
    """
    return error.with_traceback(None)


def _describe(tensor: Tensor) -> list[Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [dtype, list(tensor.shape), list(tensor.stride()), tensor.device.type == "cpu", tensor.requires_grad]


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _use_on_current_stream(value: Any, device: torch.device) -> None:
    """Keep the memory of ``value``, which is that of the channel's stream, until this one has done with it."""
    if device.type == "cuda":
        for tensor in take_apart(value)[1]:
            if tensor.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(device))


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
