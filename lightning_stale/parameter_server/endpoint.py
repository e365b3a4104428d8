"""Where the server is: what rank 0 tells the other workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how to talk to it; travels through the rendezvous store."""

    address: str
    host_id: str
    pid: int
    server_key: str
    worker_public: str
    worker_secret: str
    layout: list[list[Any]]

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: str) -> Endpoint:
        """The inverse of :meth:`encode`."""
        return cls(**json.loads(data))
