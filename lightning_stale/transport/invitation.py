"""How a process finds the fit that it is to join: what rank 0 says, in torch's rendezvous store, to whoever comes.

Nothing in it is secret, and nothing of it is believed without the secret: it names the run, whose keys derive from it.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

_KEY = "lightning_stale/fit"
_CONNECT_S = 10.0
_ANSWER = timedelta(seconds=60)


class NotInvitedError(ConnectionError):
    """There is no fit to join."""


@dataclass(frozen=True)
class Invitation:
    """A fit that runs, and may be joined.

    Args:
        run: its name.
        seed: of ``seed_everything`` on rank 0, which orders the samples; ``None`` without one.
    """

    run: str
    seed: str | None

    def post(self, store: Store) -> None:
        """On rank 0: let others find it."""
        store.set(_KEY, json.dumps(asdict(self)))

    @classmethod
    def read(cls, store: Store) -> Invitation:
        """Return what rank 0 has posted.

        Raises:
            NotInvitedError: if it has not, or the fit is over.
        """
        text: str = store.get(_KEY).decode() if store.check([_KEY]) else ""
        if not text:
            raise NotInvitedError(
                "this run has no fit that can be joined now: its strategy is StaleSyncStrategy(elastic=True), and rank "
                "0 prints how to join when training starts, until it is over"
            )
        return cls(**json.loads(text))


def withdraw(store: Store) -> None:
    """On rank 0: the fit is over."""
    store.set(_KEY, "")


def connect(host: str, port: int) -> Store:
    """Return the rendezvous store of the run whose rank 0 listens on ``port`` of ``host``.

    Raises:
        NotInvitedError: if nobody does.
    """
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
        return TCPStore(host, port, is_master=False, timeout=_ANSWER, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise NotInvitedError(
            f"no run can be reached at {host}:{port} ({error}): write the address that its rank 0 has printed, with "
            "which its host is reached from this one (MASTER_ADDR of the run); it is there while the run goes on"
        ) from error
