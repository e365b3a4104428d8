"""How the tensors of one message get to the other process, once a header has said what they are.

Through gloo they may be sent at any time: who is not ready keeps a socket waiting. Over NCCL, a send or receive that
waits for the other side occupies the device meanwhile: a call that waits for the whole device (the allocator's, say)
would never return, and a collective behind it would keep others from coming. There the sender asks, the receiver
answers when it has room, and only then do both begin what both are ready for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.transport.groups import FOREVER, break_off

_GRANT = 1
"""The tag under which the receiver answers."""


def put(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int = 0) -> None:
    """Send ``tensor`` through gloo, however long it takes."""
    work = dist.isend(tensor, peer, group, tag)
    assert work is not None
    work.wait(FOREVER)


def get(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int = 0) -> Tensor:
    """Receive into ``tensor`` through gloo, however long it takes."""
    work = dist.irecv(tensor, peer, group, tag)
    assert work is not None
    work.wait(FOREVER)
    return tensor


class Transfer(ABC):
    """One direction; the sender's methods are called by one thread, and the receiver's by one.

    Args:
        peer: the other's global rank.
        device: where the tensors are.
    """

    def __init__(self, peer: int, device: torch.device) -> None:
        self._peer, self._device = peer, device
        cuda = device.type == "cuda"
        # not the default stream, on which the stage computes: what waits here must not hold it up
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    @abstractmethod
    def sending(self, ready: torch.cuda.Event | None) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Enter what a message's tensors are sent in, once ``ready`` has happened; they are sent when it is left."""

    @abstractmethod
    def receiving(self) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Enter what a message's tensors are received in; they are there when it is left."""

    def break_off(self) -> None:  # noqa: B027
        """Let everything fail that waits in a group of its own."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor to receive into."""
        with self.on_stream():
            return torch.empty(list(shape), dtype=dtype, device=self._device)

    def on_stream(self) -> AbstractContextManager[object]:
        """Enter what is computed with a message's tensors on their way in."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _await_stream(self) -> None:
        """Let this thread, and neither the device nor the stage, wait until all of the above is done."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            done.synchronize()


class GlooTransfer(Transfer):
    """Through gloo; what is on a GPU, through page-locked memory.

    Args:
        peer, device: as in :class:`Transfer`.
        group: gloo's, for this direction alone.
    """

    def __init__(self, peer: int, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__(peer, device)
        self._group = group

    @contextmanager
    def sending(self, ready: torch.cuda.Event | None) -> Iterator[Callable[[Tensor], None]]:
        staged: list[Tensor] = []
        with self.on_stream():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            yield lambda tensor: staged.append(tensor if self._stream is None else _staged(tensor))
        self._await_stream()
        for tensor in staged:
            put(tensor, self._peer, self._group)

    @contextmanager
    def receiving(self) -> Iterator[Callable[[Tensor], None]]:
        staged: list[Tensor] = []  # kept until they are copied

        def receive(tensor: Tensor) -> None:
            if self._stream is None:
                get(tensor, self._peer, self._group)
                return
            with self.on_stream():
                staged.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
                tensor.copy_(get(staged[-1], self._peer, self._group), non_blocking=True)

        yield receive
        self._await_stream()


class GrantedTransfer(Transfer):
    """Through a group in which sends and receives occupy the device until the other side has come: NCCL's.

    Args:
        peer, device: as in :class:`Transfer`.
        group: NCCL's, for this direction alone.
        control: gloo's, likewise.
        grants: kept by who must not be disturbed by transfers; nothing is granted meanwhile.
    """

    def __init__(
        self,
        peer: int,
        device: torch.device,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
        grants: AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__(peer, device)
        self._group, self._control = group, control
        self._grants = nullcontext() if grants is None else grants

    def break_off(self) -> None:
        break_off(self._group)

    @contextmanager
    def sending(self, ready: torch.cuda.Event | None) -> Iterator[Callable[[Tensor], None]]:
        sent: list[Tensor] = []  # kept until they are there

        def send(tensor: Tensor) -> None:
            sent.append(tensor)
            work = dist.isend(tensor, self._peer, self._group)
            assert work is not None
            work.wait()  # on NCCL, the stream does

        if ready is not None:
            ready.synchronize()  # a send that waits for it would occupy the device
        get(torch.empty(1, dtype=torch.uint8), self._peer, self._control, _GRANT)
        with self.on_stream():
            yield send
        self._await_stream()

    @contextmanager
    def receiving(self) -> Iterator[Callable[[Tensor], None]]:
        def receive(tensor: Tensor) -> None:
            with self.on_stream():
                work = dist.irecv(tensor, self._peer, self._group)
                assert work is not None
                work.wait()

        with self._grants:
            put(torch.zeros(1, dtype=torch.uint8), self._peer, self._control, _GRANT)
            yield receive
            self._await_stream()


def _staged(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
