"""One state machine that decides: who is here, who may go on, who gets which batch, where all meet, what has failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lightning_stale import events
from lightning_stale.coordinator.leases import Leases
from lightning_stale.coordinator.meetings import DifferentPlacesError, Meeting
from lightning_stale.coordinator.membership import Membership
from lightning_stale.coordinator.messages import (
    Abort,
    Aborted,
    Arrive,
    Fail,
    Failed,
    Fenced,
    FromMember,
    Granted,
    Join,
    Joined,
    Leave,
    Lose,
    Message,
    Met,
    Push,
    Refused,
    Released,
    Reply,
    Request,
    SetThresholds,
    ThresholdsSet,
)
from lightning_stale.failures import FailureKind
from lightning_stale.paradigms import Paradigm

OnLoss = Literal["end", "go on"]


class Coordinator:
    """Takes messages and gives replies; does no input or output, and asks nobody what time it is.

    So it can be driven through a million random events, simulated and replayed; :mod:`.service` moves its messages.

    Args:
        members: how many ranks the run starts with.
        paradigm: the gate of pushes; without one there are none.
        leases: hands out batches; without it there are none to ask for.
        on_loss: whether the run ends when a member is lost, or goes on without it.
        record: is told what happened.

    Example::

        >>> from lightning_stale.coordinator.coordinator import Coordinator
        >>> from lightning_stale.coordinator.messages import Arrive, Join
        >>> coordinator = Coordinator(members=2)
        >>> [reply] = coordinator.handle(Join(0, process=4711), now=0.0)
        >>> reply
        Joined(member=0, generation=1)
        >>> coordinator.handle(Arrive(0, 1, "validation", "step 4"), now=1.0)
        []
        >>> coordinator.handle(Join(1, process=4712), now=2.0)
        [Joined(member=1, generation=1)]
        >>> coordinator.handle(Arrive(1, 1, "validation", "step 4"), now=3.0)
        [Met(member=0, thresholds={}), Met(member=1, thresholds={})]
    """

    def __init__(
        self,
        members: int,
        paradigm: Paradigm | None = None,
        *,
        leases: Leases | None = None,
        on_loss: OnLoss = "end",
        record: Callable[[events.Event], None] = lambda event: None,
    ) -> None:
        self.membership = Membership(range(members))
        self.paradigm = paradigm
        self.failure: Failed | None = None
        self._leases = leases
        self._on_loss = on_loss
        self._record = record
        self.meeting = Meeting()

    @property
    def over(self) -> bool:
        """Whether all members have been here, and are gone."""
        return self.membership.over

    def handle(self, message: Message, now: float) -> list[Reply]:
        """Return what ``message`` leads to, in the order in which it is to be said.

        Args:
            message: one of :mod:`.messages`.
            now: the time, in seconds; never less than before.

        Raises:
            ValueError: for what no member can say: a push before all have met, a join of who is here.
        """
        match message:
            case Join():
                return self._join(message, now)
            case Fail():
                return self._fail("error", message.text, now)
            case _ if not self.membership.speaks(message.member, message.generation):
                return [Fenced(message.member, message.generation)]
            case _:
                return self._handle(message, now)

    def _handle(self, message: FromMember, now: float) -> list[Reply]:
        match message:
            case Push():
                return self._push(message, now)
            case Arrive():
                return self._arrive(message, now)
            case Request():
                return self._request(message, now)
            case SetThresholds():
                return self._set_thresholds(message, now)
            case Abort():
                cause = "" if self.failure is None else self.failure.text
                replies = self._fail(message.kind, f"rank {message.member} {message.text}", now)
                return [*replies, Aborted(message.member, cause)]
            case Leave():
                self.membership.finished.add(message.member)
                return self._remove(message.member, now)
            case Lose():
                return self._lose(message, now)

    # --- membership -------------------------------------------------------------------------------------------------

    def _join(self, message: Join, now: float) -> list[Reply]:
        member = self.membership.join(message.member, message.process)
        self._record(events.Joined(now, message.member))
        return [Joined(member.rank, member.generation), *self._tell_failure(message.member)]

    def _remove(self, rank: int, now: float, because: str | None = None) -> list[Reply]:
        self.membership.remove(rank)
        self._record(events.Left(now, rank))
        replies = [] if because is None else self._fail("error", because, now)
        if self._leases is not None:
            replies += self._grants(self._leases.take_back(rank, now))
        self.meeting.leave(rank)
        return [*replies, *self._leave_gate(rank, now), *self._open_meeting(now)]

    def _lose(self, message: Lose, now: float) -> list[Reply]:
        process = self.membership.present[message.member].process
        text = f"rank {message.member} (process {process}) is gone: it was killed, has crashed or hangs"
        return self._remove(message.member, now, text if self._on_loss == "end" else None)

    # --- the gate ---------------------------------------------------------------------------------------------------

    def _push(self, message: Push, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        if self.paradigm is None or message.member not in self.paradigm.clocks:
            raise ValueError(f"rank {message.member} has pushed before all have met")
        grants: list[Reply] = []
        if self._leases is not None:
            stale = self._leases.stale(message.member, message.leases)
            if stale is not None:
                return [Refused(message.member, stale)]
            grants = self._grants(self._leases.commit(message.member, message.leases, now))
        return [*self._release(self.paradigm.push(message.member, now), now), *grants]

    def _leave_gate(self, rank: int, now: float) -> list[Reply]:
        if self.paradigm is None or rank not in self.paradigm.clocks:
            return []
        return self._release(self.paradigm.leave(rank, now), now)

    def _release(self, ranks: Sequence[int], now: float) -> list[Reply]:
        if self.failure is not None:  # who waits knows of it
            return []
        return [self._released(rank, now) for rank in ranks]

    def _released(self, rank: int, now: float) -> Released:
        assert self.paradigm is not None
        lead = self.paradigm.lead(rank)
        self._record(events.Released(now, rank, lead))
        return Released(rank, self.paradigm.clocks[rank], lead)

    def _set_thresholds(self, message: SetThresholds, now: float) -> list[Reply]:
        if self.paradigm is None:
            return [ThresholdsSet(message.member, "there is no paradigm here")]
        try:
            released = self.paradigm.set_thresholds(now, **message.thresholds)
        except ValueError as error:
            return [ThresholdsSet(message.member, str(error))]
        self._record(events.ThresholdsSet(now, self.paradigm.thresholds))
        return [*self._release(released, now), ThresholdsSet(message.member, None)]

    # --- leases -----------------------------------------------------------------------------------------------------

    def _request(self, message: Request, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        if self._leases is None:
            raise ValueError(f"rank {message.member} asks for a batch, and nobody hands them out")
        grant = self._leases.request(message.member, now)
        return [] if grant is None else self._grants([(message.member, *grant)])

    def _grants(self, grants: Sequence[tuple[int, int, int | None]]) -> list[Reply]:
        return [] if self.failure is not None else [Granted(*grant) for grant in grants]

    # --- meetings ---------------------------------------------------------------------------------------------------

    def _arrive(self, message: Arrive, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        released = self._leave_gate(message.member, now)  # it pushes no more until all have met: nobody waits for it
        self.meeting.arrive(message.member, message.place, message.detail)
        return [*released, *self._open_meeting(now)]

    def _open_meeting(self, now: float) -> list[Reply]:
        if self.failure is not None:
            return []
        try:
            finished = self.membership.finished if self._on_loss == "end" else set()
            met = self.meeting.open(self.membership.awaited, finished)
        except DifferentPlacesError as error:
            return self._fail("error", str(error), now)
        thresholds = {} if self.paradigm is None else self.paradigm.thresholds
        for rank in met:
            self._record(events.Met(now, rank))
            if self.paradigm is not None:
                self.paradigm.join(rank, now)
        return [Met(rank, thresholds) for rank in met]

    # --- failure ----------------------------------------------------------------------------------------------------

    def _fail(self, kind: FailureKind, text: str, now: float) -> list[Reply]:
        """Note the first failure, and tell it to everybody who is here; of those after it nobody hears."""
        if self.failure is not None:
            return []
        self.failure = Failed(-1, kind, text)
        self._record(events.Failed(now, kind, text))
        return [reply for rank in self.membership.present for reply in self._tell_failure(rank)]

    def _tell_failure(self, rank: int) -> list[Reply]:
        return [] if self.failure is None else [Failed(rank, self.failure.kind, self.failure.text)]
