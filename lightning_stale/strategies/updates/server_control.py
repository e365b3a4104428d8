"""Under a parameter server, the server is where ranks meet, and who knows what has failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from lightning_stale.coordinator.connection import ServerLostError
from lightning_stale.failures import FailureKind, RunFailedError
from lightning_stale.parameter_server.client import Meeting, ParameterClient
from lightning_stale.transport.wire import WireError


class ServerControl:
    """A :class:`~lightning_stale.strategies.other_ranks.Control`.

    Args:
        client: the connection to the server.
        check_meeting: called before a meeting amid a step; raises where there can be none.
        note_meeting: called after each meeting, with what is the same on all ranks.
    """

    def __init__(
        self,
        client: ParameterClient,
        check_meeting: Callable[[], None],
        note_meeting: Callable[[Meeting], None],
    ) -> None:
        self._client, self._check_meeting, self._note_meeting = client, check_meeting, note_meeting
        self._next = ("", "")

    @property
    def failure(self) -> RunFailedError | None:
        return self._client.failure

    def check(self, fresh: bool = False) -> None:
        if fresh:
            with suppress(ServerLostError, WireError):
                self._client.summary()  # the server tells a failure before it answers
        if self._client.failure is not None:
            raise self._client.failure

    def blame(self) -> None:
        self.check(fresh=True)

    def come_to(self, place: str, detail: str) -> None:
        self._next = (place, detail)

    def await_others(self) -> None:
        self.meet(*self._next)

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        """Meet amid a step: weights stay as they are."""
        self._check_meeting()
        self._note_meeting(self._client.meet(place, detail, pull=False, region=region))

    def meet_and_pull(self, place: str, detail: str, timeout_s: float = math.inf, region: str = "") -> None:
        """Meet, and have the newest weights, which are then the same on all ranks."""
        self._note_meeting(self._client.meet(place, detail, timeout_s=timeout_s, region=region))

    def fail(self, kind: FailureKind, text: str) -> RunFailedError | None:
        return self._client.abort(kind, text)

    def close(self, finished: bool) -> None:
        self._client.close(finished)
