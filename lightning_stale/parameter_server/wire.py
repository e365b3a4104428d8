"""What travels between a worker and the server: small msgpack messages, and tensors in chunks. Nothing is unpickled.

A message is one frame with a map that has a ``"type"``, or two frames where a chunk of bytes follows. The types and
their fields are in :data:`SCHEMA`; a frame that does not fit it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgpack
import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20
HEADER_BYTES = CHUNK_BYTES
MAX_FRAME_BYTES = 2 * CHUNK_BYTES
"""The longest frame that a socket accepts; a peer that sends more is disconnected."""

HEARTBEAT_MS = 3_000
HEARTBEAT_TIMEOUT_MS = 20_000

SCHEMA: dict[str, dict[str, type | tuple[type, ...]]] = {
    # worker -> server
    "hello": {"rank": int, "pid": int, "shared": bool},
    "unshare": {},  # the shared memory cannot be reached after all: chunks instead
    "push": {
        "optimizer": int,
        "used": list,  # of the parameters of this optimizer: which have a gradient
        "options": list,  # the current values of its param groups
        "clip": (list, type(None)),  # [value, "norm" | "value"] for the mean of the round
        "nbytes": int,  # of the chunks that follow
        "wait_s": float,
        "compute_s": float,
    },
    "chunk": {"offset": int},
    "sync": {"place": str, "detail": str, "pull": bool, "wait_s": float, "compute_s": float},
    "pull": {},
    "thresholds": {"values": dict},  # names and new values; the reply is None, or what is wrong with them
    "optimizer_state": {"optimizer": int},
    "snapshot": {},
    "summary": {},
    "abort": {"kind": str, "text": str},
    "bye": {},
    # server -> worker
    "welcome": {"path": str, "token": bytes, "nbytes": int},
    "released": {"version": int, "clock": int, "lead": int, "staleness": int, "nbytes": int},
    "synced": {"version": int, "thresholds": dict, "nbytes": int},
    "reply": {"nbytes": int},
    "failed": {"kind": str, "text": str},
    "aborted": {"cause": str},  # the failure that came before, if any
}


class WireError(ValueError):
    """A message that does not follow the protocol."""


def encode_message(kind: str, /, **fields: Any) -> bytes:
    """Return the frame of a message."""
    frame: bytes = msgpack.packb({"type": kind, **fields}, use_bin_type=True)
    return frame


def decode_message(frame: bytes) -> dict[str, Any]:
    """Return the map in ``frame``.

    Raises:
        WireError: if it is too long, not msgpack, or does not fit :data:`SCHEMA`.
    """
    if len(frame) > HEADER_BYTES:
        raise WireError(f"a header of {len(frame)} bytes; the limit is {HEADER_BYTES}")
    try:
        message = msgpack.unpackb(frame, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error}") from error
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in SCHEMA:
        raise WireError("not a message of this protocol")
    fields = SCHEMA[kind]
    if message.keys() != {"type", *fields}:
        raise WireError(f"a {kind!r} message with the fields {list(message)}")
    for name, expected in fields.items():
        if not isinstance(message[name], expected):
            raise WireError(f"a {kind!r} message with {name}={message[name]!r}")
    return cast(dict[str, Any], message)


def chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) byte ranges of at most :data:`CHUNK_BYTES` that make up ``start..end``."""
    for offset in range(start, end, CHUNK_BYTES):
        yield offset, min(end, offset + CHUNK_BYTES)


_TENSOR, _TUPLE = 1, 2


def encode_object(value: Any) -> bytes:
    """Return nested dicts, lists, tuples, numbers, strings and tensors as bytes.

    Raises:
        WireError: for anything else, with its type.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_pack_extension, strict_types=True, use_bin_type=True)
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"too large to travel, at most 4 GiB for a tensor: {error}") from error
    return packed


def decode_object(packed: bytes) -> Any:
    """The inverse of :func:`encode_object`."""
    return msgpack.unpackb(packed, ext_hook=_unpack_extension, strict_map_key=False, raw=False)


def _pack_extension(value: Any) -> msgpack.ExtType:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return msgpack.ExtType(_TENSOR, msgpack.packb([dtype, list(value.shape), flat.numpy().tobytes()]))
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, encode_object(list(value)))
    if isinstance(value, dict):  # a subclass, e.g. defaultdict
        return dict(value)
    raise WireError(
        f"{type(value).__module__}.{type(value).__qualname__} cannot travel between the parameter server and a worker: "
        "the state of an optimizer may hold tensors, numbers, strings, lists, tuples and dicts"
    )


def _unpack_extension(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(decode_object(data))
    if code == _TENSOR:
        dtype, shape, raw = msgpack.unpackb(data, raw=False)
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(getattr(torch, dtype)).reshape(shape)
    raise WireError(f"extension {code}")
