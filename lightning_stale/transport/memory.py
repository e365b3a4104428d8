"""Shared memory that has no name: mapped by the server and the workers of its host, and gone with the last of them."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARED_FOLDER = "/dev/shm"  # noqa: S108 - where Linux keeps POSIX shared memory
_TOKEN_BYTES = 64


class SharedMemoryError(RuntimeError):
    """Shared memory cannot be made or reached."""


@dataclass(frozen=True)
class Segment:
    """A mapped segment: its bytes as a tensor, and where another process of this host finds it."""

    data: Tensor
    path: str
    token: bytes
    descriptor: int

    def close(self) -> None:
        """Let nobody find it any more: it is gone once the last who has mapped it is."""
        os.close(self.descriptor)


def host_id() -> str:
    """Return an identity of this boot of this machine, which all of its containers share ('' where unknown)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def supported() -> bool:
    """Whether processes of this machine can open each other's unnamed files (Linux)."""
    return os.path.isdir("/proc/self/fd") and host_id() != ""


def choose_folder(nbytes: int, folders: Sequence[str] | None = None) -> tuple[str, str | None]:
    """Return the first of ``folders`` with ``nbytes`` free, and a warning if it is not the first.

    Args:
        nbytes: bytes that all segments take together.
        folders: candidates, the fastest first; ``/dev/shm`` and the temporary folder by default.

    Raises:
        SharedMemoryError: if none has room.
    """
    candidates = [SHARED_FOLDER, tempfile.gettempdir()] if folders is None else list(folders)
    free = {folder: _free_bytes(folder) for folder in candidates}
    for folder in candidates:
        if free[folder] >= nbytes:
            if folder == candidates[0]:
                return folder, None
            return folder, (
                f"{_room(candidates[0], free[candidates[0]])}, and the workers of this host need {_mib(nbytes)} of "
                f"shared memory: {folder} is used instead, which may be slower. Give {candidates[0]} "
                "more room, e.g. `docker run --shm-size=16g` or `mount -o remount,size=16g /dev/shm`."
            )
    rooms = ", ".join(_room(folder, room) for folder, room in free.items())
    raise SharedMemoryError(
        f"the workers of this host need {_mib(nbytes)} of shared memory, and {rooms}. Make room in one of them, or "
        "write StaleSyncStrategy(transport='tcp')."
    )


def create_segment(nbytes: int, folder: str) -> Segment:
    """Make ``nbytes`` of zeroed shared memory that only open file descriptors lead to.

    The file is unlinked before this returns, so that no way of dying leaves it behind; other processes reach it through
    this one's entry in ``/proc``, and know by the token in its first bytes that it is the right one.
    """
    try:
        descriptor, path = tempfile.mkstemp(prefix="lightning-stale-", dir=folder)
        os.unlink(path)
        try:
            os.posix_fallocate(descriptor, 0, _TOKEN_BYTES + nbytes)  # full now, not by a SIGBUS later
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise SharedMemoryError(f"cannot take {_mib(nbytes)} of shared memory in {folder}: {error}") from error
    data = _map(descriptor, _TOKEN_BYTES + nbytes)
    token = secrets.token_bytes(_TOKEN_BYTES)
    data[:_TOKEN_BYTES] = torch.frombuffer(bytearray(token), dtype=torch.uint8)
    return Segment(data[_TOKEN_BYTES:], f"/proc/{os.getpid()}/fd/{descriptor}", token, descriptor)


def open_segment(path: str, nbytes: int, token: bytes) -> Tensor:
    """Map the segment that another process of this host made.

    Raises:
        SharedMemoryError: if it cannot be reached, or is not the one with this ``token``.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise SharedMemoryError(f"cannot open the shared memory of the parameter server: {error}") from error
    try:
        if os.fstat(descriptor).st_size != _TOKEN_BYTES + nbytes:
            raise SharedMemoryError(f"{path} is not the shared memory of the parameter server")
        data = _map(descriptor, _TOKEN_BYTES + nbytes)
    finally:
        os.close(descriptor)  # the mapping stays
    if bytes(data[:_TOKEN_BYTES].tolist()) != token:
        raise SharedMemoryError(f"{path} is not the shared memory of the parameter server")
    return data[_TOKEN_BYTES:]


def _map(descriptor: int, nbytes: int) -> Tensor:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # no page faults in the first exchange
    return torch.frombuffer(mmap.mmap(descriptor, nbytes, flags=flags), dtype=torch.uint8)


def _free_bytes(folder: str) -> int:
    if not os.access(folder, os.W_OK):
        return -1
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _room(folder: str, free: int) -> str:
    return f"{folder} cannot be used" if free < 0 else f"{folder} has {_mib(free)} free"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
