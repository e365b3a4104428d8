"""Rank 0 tells the others where the server is, so that each side knows that it deals with the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from lightning_stale.transport import secret
from lightning_stale.transport.credentials import Credentials, ForgedError
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.secret import SecretError, SecretFile

_POLL_S = 0.02
_FAREWELL_S = 3.0


class ServerUnavailableError(ConnectionError):
    """Rank 0 has no server to offer."""


class Introduction:
    """Tells and learns through torch's rendezvous store, which everybody who reaches its port can read and write.

    So it gets the sealed endpoint, and at most the *name* of the file in which the secret is.

    Args:
        store: of all ranks.
        run: a name that no other run has, the same on all ranks.
        rank: this one.
        others: how many other ranks there are.
        name: of the process that rank 0 offers, in errors.
        open_to_all: whether, without a secret from the user, who reaches the store may reach the process too: where all
            that matters goes through torch.distributed in any case, which lets him in.
        invites: whether others may come until :meth:`close`: then the secret is always in a file too.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        rank: int,
        others: int,
        *,
        name: str = "parameter server",
        open_to_all: bool = False,
        invites: bool = False,
    ) -> None:
        self._store, self._run, self._rank, self._others, self._name = store, run, rank, others, name
        self._open = open_to_all and secret.from_environment() is None
        self._key = f"lightning_stale/{run}"
        self._invites = invites
        self._file: SecretFile | None = None

    @property
    def secret_file(self) -> Path | None:
        """On rank 0: where the secret is, as long as it is in a file."""
        return None if self._file is None else self._file.path

    def offer(self, start: Callable[[Credentials], Endpoint]) -> tuple[Endpoint, Credentials]:
        """On rank 0: have ``start`` make the server, and tell the others; or that it has failed."""
        try:
            given = secret.from_environment()
            if self._open:
                given = self._run
            elif given is None and self._others == 0 and not self._invites:
                given = secret.fresh()
            known = given is not None  # to the other ranks too
            if given is None or self._invites:
                self._file = SecretFile(given)
                given = self._file.secret
            credentials = Credentials.derive(given, self._run)
            endpoint = start(credentials)
        except BaseException as error:
            self._store.set(self._key, f"-{type(error).__name__}: {error}")
            self._wait_until_heard()
            raise
        name = "" if known or self._file is None else self._file.name
        self._store.set(self._key, f"+{name}\n{endpoint.encode(credentials)}")
        return endpoint, credentials

    def accept(self, check: Callable[[], None] = lambda: None) -> tuple[Endpoint, Credentials]:
        """On another rank: learn what rank 0 offers, however long its server takes to start.

        Args:
            check: called while waiting; raises to break off.

        Raises:
            ServerUnavailableError: if it has failed to.
            SecretError: if this rank has not its secret, or somebody else has told it something.
        """
        while not self._store.check([self._key]):
            check()
            time.sleep(_POLL_S)
        answer: str = self._store.get(self._key).decode()
        if not answer.startswith("+"):
            self._store.add(f"{self._key}/heard", 1)
            raise ServerUnavailableError(f"rank 0 could not start the {self._name}: {answer[1:]}")
        name, _, sealed = answer[1:].partition("\n")
        credentials = Credentials.derive(self._find_secret(name), self._run)
        try:
            return Endpoint.decode(sealed, credentials), credentials
        except ForgedError as error:
            raise SecretError(
                f"rank {self._rank} does not have the secret of rank 0, or somebody else has told it where the server "
                f"is: set {secret.VARIABLE} to the same value on all ranks, or on none of them"
            ) from error

    def close(self) -> None:
        """Remove what is left on this host: all have been told, or nobody will be."""
        if self._file is not None:
            self._file.remove()
            self._file = None

    def _wait_until_heard(self) -> None:
        """Give the others time to read why there is no server: the store mostly ends with rank 0."""
        deadline = time.monotonic() + _FAREWELL_S
        while self._store.add(f"{self._key}/heard", 0) < self._others and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _find_secret(self, name: str) -> str:
        given = secret.from_environment()
        if given is not None:
            return given
        if self._open:
            return self._run
        if name == "":
            raise SecretError(f"rank 0 has a {secret.VARIABLE} and rank {self._rank} has none: export it for all ranks")
        return secret.read(name)
