"""Values with large tensors on their way between rank 0 and the others: tensor by tensor, in pieces of bounded size."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIECE_BYTES = 32 * 2**20


class Packed:
    """A value ready to be sent: a description, and the tensors as they are, which are not copied.

    Making one may fail, on what cannot be pickled; sending it cannot, so that nobody waits for what does not come.

    Args:
        value: anything that can be pickled; a tensor that is in it several times is sent once.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._number  # type: ignore[method-assign]
        pickler.dump(value)
        self._pickled = buffer.getvalue()

    def description(self) -> bytes:
        """Return what it takes to receive it."""
        shapes = [(tensor.dtype, tuple(tensor.shape), _dense_stride(tensor)) for tensor in self.tensors]
        return pickle.dumps((self._pickled, shapes))

    def unpack(self, tensors: Sequence[Tensor]) -> Any:
        """Return a copy of the value with ``tensors`` in place of its own."""
        return _unpickled(self._pickled, tensors)

    def _number(self, value: Any) -> int | None:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


def send(packed: Packed, to: int, device: torch.device) -> None:
    """Send a value to rank ``to``, which must :func:`receive` it.

    Args:
        packed: the value.
        to: the global rank.
        device: of this rank; a piece goes over it where the backend moves nothing else (NCCL).
    """
    over = _transport(device)
    description = torch.frombuffer(bytearray(packed.description()), dtype=torch.uint8)
    dist.send(torch.tensor([len(description)], device=over), to)
    dist.send(description.to(over), to)
    for tensor in packed.tensors:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        dense = tensor if tensor.stride() == _dense_stride(tensor) else tensor.contiguous()
        for piece in _pieces(dense):
            dist.send(piece.to(over), to)


def receive(source: int, device: torch.device) -> Any:
    """Return what rank ``source`` sends; its tensors are on the CPU."""
    over = _transport(device)
    length = torch.zeros(1, dtype=torch.int64, device=over)
    dist.recv(length, source)
    description = torch.empty(int(length), dtype=torch.uint8, device=over)
    dist.recv(description, source)
    pickled, shapes = pickle.loads(description.cpu().numpy().tobytes())
    tensors = [_receive_tensor(source, over, *shape) for shape in shapes]
    return _unpickled(pickled, tensors)


def gather(packed: Packed, value: Any, device: torch.device) -> list[Any] | None:
    """Return ``value`` of every rank on rank 0, one rank after the other; ``None`` on the others."""
    if dist.get_rank() > 0:
        send(packed, 0, device)
        return None
    return [value, *(receive(rank, device) for rank in range(1, dist.get_world_size()))]


def spread(packed: Sequence[Packed], values: Sequence[Any] | None, device: torch.device) -> Any:
    """Return, on every rank, its entry of what rank 0 has as ``values`` and ``packed``."""
    if values is None:
        return receive(0, device)
    for rank in range(1, dist.get_world_size()):
        send(packed[rank], rank, device)
    return values[0]


def _unpickled(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(pickled))
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()


def _receive_tensor(
    source: int, over: torch.device, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    for piece in _pieces(tensor):
        if over.type == "cpu":
            dist.recv(piece, source)
        else:
            arrived = torch.empty_like(piece, device=over)
            dist.recv(arrived, source)
            piece.copy_(arrived)
    return tensor


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of the memory of a dense tensor, as bytes."""
    if tensor.numel() == 0:
        return
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    for start in range(0, len(flat), PIECE_BYTES):
        yield flat[start : start + PIECE_BYTES]


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of ``tensor`` if it has no gaps (channels_last, say), or those of a contiguous one."""
    return torch.empty_like(tensor, device="meta").stride()


def _transport(device: torch.device) -> torch.device:
    return device if device.type == "cuda" and dist.get_backend() == "nccl" else torch.device("cpu")
