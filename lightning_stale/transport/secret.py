"""The secret that the ranks of a run share: through a file that only their user can read, or the environment.

On one host, rank 0 leaves it in a file while the others connect, whoever has started them (Lightning, torchrun, SLURM,
Hydra). Several hosts share no file: there the user gives all ranks the same :data:`VARIABLE`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "LIGHTNING_STALE_SECRET"
_MIN_LENGTH = 32
_FORGOTTEN_S = 24 * 3600.0
_CURE = (
    f"give all ranks the same secret before they are started: export {VARIABLE}=$(openssl rand -hex 32), in the job "
    "script of SLURM, or with one value on every host for torchrun"
)


class SecretError(RuntimeError):
    """The ranks cannot share a secret."""


def check(num_nodes: int) -> None:
    """See that there will be a secret.

    Raises:
        SecretError: if the ranks are on several hosts and were given none, or one that can be guessed.
    """
    if from_environment() is None and num_nodes > 1:
        raise SecretError(
            f"the ranks of {num_nodes} hosts talk to the parameter server over the network, and have no secret that "
            f"keeps others out: {_CURE}"
        )


def from_environment() -> str | None:
    """Return the secret that the user has given all ranks, if so.

    Raises:
        SecretError: if it can be guessed.
    """
    secret = os.environ.get(VARIABLE)
    if secret is not None and len(secret) < _MIN_LENGTH:
        raise SecretError(f"{VARIABLE} has {len(secret)} characters, and can be guessed: {_CURE}")
    return secret


def fresh() -> str:
    """Return a new one."""
    return secrets.token_hex(32)


class SecretFile:
    """A secret in a file that only this user can read, from rank 0.

    Args:
        given: the secret; a fresh one by default.

    Attributes:
        name: of the file, in a folder that every rank of this host knows; need not be secret.
        path: of the file.
        secret: what is in it.

    Raises:
        SecretError: if others could read or replace it.
    """

    def __init__(self, given: str | None = None) -> None:
        folder = _folder()
        _forget_old(folder)
        self.name, self.secret = secrets.token_hex(16), given or fresh()
        self.path = folder / self.name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self.path, flags, 0o600), "w")
        fcntl.flock(self._file, fcntl.LOCK_SH)  # as long as it is needed: other runs leave it alone
        self._file.write(self.secret)
        self._file.flush()

    def remove(self) -> None:
        """Remove the file: all have read it, or nobody will."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def read(name: str) -> str:
    """Return the secret in the file that rank 0 calls ``name``.

    Raises:
        SecretError: if there is none, or somebody else could have written it.
    """
    if not re.fullmatch("[0-9a-f]{32}", name):
        raise SecretError(f"{name!r} is not the name of a secret: somebody has changed what rank 0 has told")
    path = _folder() / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SecretError(
            f"rank 0 has left the secret of this run in {path}, and this rank cannot read it ({error.strerror}): "
            f"{_CURE}"
        ) from error
    with os.fdopen(descriptor) as file:
        _check_private(path, os.fstat(descriptor), stat.S_ISREG)
        return file.read()


def read_from(path: Path) -> str:
    """Return the secret in a file that the user names.

    Raises:
        SecretError: if there is none, or others could read it; it says what to do.
    """
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            found = file.read().strip()
    except OSError as error:
        raise SecretError(
            f"--secret {path} cannot be read ({error.strerror}): name the file that rank 0 has printed, which is there "
            "while its fit runs; on another host, a copy of it that only you can read (mode 600)"
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SecretError(
            f"--secret {path} is not this user's alone (owner {status.st_uid}, mode {stat.filemode(status.st_mode)}): "
            f"run chmod 600 {path}"
        )
    if len(found) < _MIN_LENGTH:
        raise SecretError(f"--secret {path} has {len(found)} characters: name the file that rank 0 has printed")
    return found


def _folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not (base and os.path.isdir(base) and os.stat(base).st_uid == os.geteuid()):
        base = tempfile.gettempdir()
    folder = Path(base) / f"lightning-stale-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_private(folder, folder.lstat(), stat.S_ISDIR)
    return folder


def _check_private(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SecretError(
            f"{path} is not this user's alone (owner {status.st_uid}, mode {stat.filemode(status.st_mode)}), and the "
            f"secret of a run must be: remove it, or {_CURE}"
        )


def _forget_old(folder: Path) -> None:
    """Remove what runs have left whose rank 0 was killed while others could connect."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < time.time() - _FORGOTTEN_S:
                with path.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which fails while its run goes on
                    path.unlink()
