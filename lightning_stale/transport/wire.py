"""What travels between a worker and the server: small msgpack messages, and tensors in chunks. Nothing is unpickled.

A message is one frame with a map that has a ``"type"``, or two frames where a chunk of bytes follows. The types and
their fields are in :data:`SCHEMA`; a frame that does not fit it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgpack

CHUNK_BYTES = 4 * 2**20
HEADER_BYTES = CHUNK_BYTES
MAX_FRAME_BYTES = 2 * CHUNK_BYTES
"""The longest frame that a socket accepts; a peer that sends more is disconnected."""

HEARTBEAT_MS = 3_000
HEARTBEAT_TIMEOUT_MS = 20_000

SCHEMA: dict[str, dict[str, type | tuple[type, ...]]] = {
    # worker -> server
    "hello": {
        "rank": int,  # -1: as any, anew
        "pid": int,
        "shared": bool,
        "anew": bool,  # while the run goes on: the welcome comes when it can begin
    },
    "unshare": {},  # the shared memory cannot be reached after all: chunks instead
    "push": {
        "optimizer": int,
        "used": list,  # of the parameters of this optimizer: which have a gradient
        "options": list,  # the current values of its param groups
        "clip": (list, type(None)),  # [value, "norm" | "value"] for the mean of the round
        "whole": bool,  # whether all weights come with the OK, or those only that this push has changed
        "leases": list,  # of the batches in it, where they are handed out
        "asks": bool,  # whether the next ones are to come with the OK
        "commits": bool,  # whether no other push with their gradients follows
        "nbytes": int,  # of the chunks that follow
        "wait_s": float,
        "compute_s": float,
    },
    "chunk": {"offset": int},
    "more": {},  # a chunk has arrived: the next one
    "change": {"places": list, "nbytes": int},  # weights that the only worker has set itself; their chunks follow
    "sync": {
        "place": str,
        "detail": str,
        "region": str,  # of the program, which is begun anew if a worker is lost in it
        "pull": bool,
        "wait_s": float,
        "compute_s": float,
    },
    "deposit": {"part": bytes, "last": bool},  # what who joins anew begins with, from rank 0
    "deposited": {},
    "request": {
        "leases": list,  # of batches that are trained, and that no push has committed
        "plan": (list, type(None)),  # what there is until the next meeting: the fields of `Plan`
        "kept": list,  # leases of batches whose gradients a later push will have
        "steps": int,  # of optimizers, in the batch that is over
    },
    "progress": {},  # which batches of the epoch are committed
    "pull": {},  # all weights, without waiting
    "thresholds": {"values": dict},  # names and new values; the reply is None, or what is wrong with them
    "optimizer_state": {"optimizer": int},
    "snapshot": {},
    "summary": {},
    "ping": {},  # what is known of failures by now comes before the answer
    "abort": {"kind": str, "text": str},
    "bye": {},
    # server -> worker
    "welcome": {"rank": int, "generation": int, "path": str, "token": bytes, "nbytes": int},
    "released": {
        "version": int,
        "clock": int,
        "lead": int,
        "staleness": int,
        "applied": bool,  # whether the apply rule let the push be an update
        "grant": (list, type(None)),  # the fields of `Grant`, where it was asked for
        "nbytes": int,
    },
    "granted": {"version": int, "grant": list, "nbytes": int},
    "trained": {"leases": dict},  # `Leases.state_dict()`
    "refused": {"lease": int},  # the push, which holds one that was taken back
    "synced": {
        "version": int,
        "thresholds": dict,
        "members": list,  # rank and generation of each who has come, one after the other
        "nbytes": int,
    },
    "reply": {"nbytes": int, "size": int, "head": int},  # of the parcel
    "pong": {"now": float},  # by the clock of the process that answers
    "lost": {},  # in the run that is replayed, this worker was lost here
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
