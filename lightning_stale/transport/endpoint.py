"""Where the server is: what rank 0 tells the other workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lightning_stale.transport.credentials import Credentials


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and what its buffers look like; nothing in it is secret."""

    address: str
    host_id: str
    pid: int
    layout: list[list[Any]]

    def encode(self, credentials: Credentials) -> str:
        """Return it as JSON, sealed: it travels through torch's rendezvous store, which anybody may write to."""
        return credentials.seal(json.dumps(asdict(self)))

    @classmethod
    def decode(cls, data: str, credentials: Credentials) -> Endpoint:
        """The inverse of :meth:`encode`.

        Raises:
            ForgedError: if it is not from who has the same secret.
        """
        return cls(**json.loads(credentials.unseal(data)))
