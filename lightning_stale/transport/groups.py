"""Process groups of our own: waited in for as long as it takes, broken off when need be, and gone before Python is.

A thread that is in torch's C++ while the interpreter ends makes the process abort ("terminate called without an active
exception", status 134): CPython ends such a thread by unwinding its stack, through a destructor of pybind11's that must
not be left so. Nobody may therefore wait in a group at exit, and what waits there has to be woken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FOREVER = timedelta(days=3650)
"""For who waits while somebody else looks after the ranks: what is slow, or suspended, has not failed."""

_NEVER_SENT = 2**31 - 1


def new_group(ranks: Sequence[int], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """Make a group of ``ranks``, in which all ranks of the run take part.

    Args:
        ranks: its members.
        timeout: how long they may take to find each other, and how long a collective takes.
        backend: by default that of the run.
    """
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return group


def break_off(group: dist.ProcessGroup) -> None:
    """Let everything fail that waits in ``group``, in this process at once; other ranks see a broken connection."""
    group.abort()  # NCCL's; gloo has no such thing, but closes all connections of a group where a deadline is missed
    if group.size() > 1 and "gloo" in _backend(group):
        with suppress(RuntimeError):
            other = (group.rank() + 1) % group.size()
            group.recv([torch.zeros(1)], other, _NEVER_SENT).wait(timedelta(milliseconds=1))


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy ``group``, unless all have been; its connections and threads go with the last reference to it."""
    if dist.is_initialized():
        with suppress(ValueError):  # destroyed with a run before this one
            dist.destroy_process_group(group)


def gather_everywhere(value: Any) -> list[Any]:
    """Return ``value`` of every rank, on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _backend(group: dist.ProcessGroup) -> str:
    try:
        return dist.get_backend(group)
    except (ValueError, AssertionError):  # it has been destroyed, and may be waited in all the same
        return group.name()
