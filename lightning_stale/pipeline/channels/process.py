"""A channel between two stages of different processes, over torch.distributed.

A sender is never blocked while fewer messages wait than the queue is long, and a receiver finds what has arrived: each
direction of a pair of stages has its own process group, and a thread on either side that sends or receives while the
stage computes. Nothing here has a time limit: a neighbour may validate for hours. Whether it still lives is for
``check`` to say.
"""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.pipeline.channels.channel import Channel, ChannelError, checked
from lightning_stale.pipeline.channels.message import CLOSE, DATA, Form, Header, describe, described
from lightning_stale.pipeline.channels.transfer import GlooTransfer, Transfer, get, put
from lightning_stale.pipeline.values import strides
from lightning_stale.pipeline.values.trees import Tree, put_together, tensors
from lightning_stale.transport.groups import break_off

_POLL_S = 0.5


class _ProcessChannel(Channel):
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


class SendChannel(_ProcessChannel):
    """The sending end between two processes; arguments as for :class:`_ProcessChannel`."""

    def _prepare(self) -> None:
        self._outbox: queue.Queue[tuple[int, bytes, list[Tensor], Any] | None] = queue.Queue()
        self._unsent = 0
        self._changed = threading.Condition()
        self._described: bytes = b""

    def send(self, batch: int, value: Any) -> None:
        description, found = describe(value)
        with self._changed:
            self._unsent += 1
        self._outbox.put((batch, description, found, _recorded_event(self._device)))
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
            put(Header(0, 0, CLOSE).pack(), self._peer, self._group)
        except Exception as error:
            with self._changed:
                self._error = _without_frames(error)
                self._changed.notify_all()

    def _send(self, batch: int, description: bytes, found: list[Tensor], ready: torch.cuda.Event | None) -> None:
        new = description != self._described
        self._described = description
        put(Header(batch, len(description) if new else 0, DATA).pack(), self._peer, self._group)
        if new:
            put(torch.frombuffer(bytearray(description), dtype=torch.uint8), self._peer, self._group)
        with self._transfer.sending(ready) as send:
            for tensor in found:
                if tensor.numel() > 0:
                    send(strides.flat(tensor.to(self._device)).view(torch.uint8))


class ReceiveChannel(_ProcessChannel):
    """The receiving end between two processes; arguments as for :class:`_ProcessChannel`."""

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
            return checked(batch, got, value)

    def queued(self) -> int:
        return self._inbox.qsize()

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
        forms: list[Form] = []
        try:
            while True:
                if not self._closing:
                    self._room.acquire()
                header = Header(*get(Header.empty(), self._peer, self._group).tolist())
                if header.kind == CLOSE:
                    raise ChannelError("it has closed the channel")
                if header.length:
                    packed = get(torch.empty(header.length, dtype=torch.uint8), self._peer, self._group)
                    tree, forms = described(packed.numpy().tobytes())
                with self._transfer.receiving() as receive:
                    received = [self._tensor(receive, form) for form in forms]
                if not self._closing:
                    self._inbox.put((header.batch, put_together(tree, received)))
                del received
        except Exception as error:
            self._error = _without_frames(error)

    def _tensor(self, receive: Callable[[Tensor], None], form: Form) -> Tensor:
        elements = self._transfer.empty([form.nbytes], torch.uint8)
        if form.nbytes > 0:
            receive(elements)
        with self._transfer.on_stream():
            tensor = form.tensor(elements)
            if form.on_cpu:
                tensor = tensor.cpu()
        return tensor.detach().requires_grad_(form.requires_grad)


def _without_frames(error: Exception) -> Exception:
    """Return it without what refers to the channel that keeps it, and to the group under it.

    A group in a cycle goes at some garbage collection, which may be in a forked process, such as a loader's worker:
    there its threads do not exist, and their end is a crash.
    """
    return error.with_traceback(None)


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _use_on_current_stream(value: Any, device: torch.device) -> None:
    """Keep the memory of ``value``, which is that of the channel's stream, until this one has done with it."""
    if device.type == "cuda":
        for tensor in tensors(value):
            if tensor.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(device))
