"""One state machine that decides: who is here, who may go on, who gets which batch, where all meet, what has failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from lightning_stale import events
from lightning_stale.coordinator.leases import Grant, Grants, Leases, Plan
from lightning_stale.coordinator.meetings import DifferentPlacesError, Meeting
from lightning_stale.coordinator.membership import Membership
from lightning_stale.coordinator.messages import (
    ANY,
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
    Prepared,
    Push,
    Refused,
    Released,
    Reply,
    Request,
    RoundOver,
    SetThresholds,
    ThresholdsSet,
    Withdraw,
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
        on_loss: whether the run ends when a member is lost, or goes on without it, and with who joins anew. Without
            rank 0 it never does.
        least: with fewer members than these left, it ends all the same.
        record: is told what happened.

    Example::

        >>> from lightning_stale.coordinator.coordinator import Coordinator
        >>> from lightning_stale.coordinator.messages import Arrive, Join
        >>> coordinator = Coordinator(members=2)
        >>> [reply] = coordinator.handle(Join(0, process=4711), now=0.0)
        >>> reply
        Joined(member=0, generation=1, ticket=0)
        >>> coordinator.handle(Arrive(0, 1, "validation", "step 4"), now=1.0)
        []
        >>> coordinator.handle(Join(1, process=4712), now=2.0)
        [Joined(member=1, generation=1, ticket=0)]
        >>> coordinator.handle(Arrive(1, 1, "validation", "step 4"), now=3.0)
        [Met(member=0, thresholds={}, members=((0, 1), (1, 1))), Met(member=1, thresholds={}, members=((0, 1), (1, 1)))]
    """

    def __init__(
        self,
        members: int,
        paradigm: Paradigm | None = None,
        *,
        leases: Leases | None = None,
        on_loss: OnLoss = "end",
        least: int = 1,
        record: Callable[[events.Event], None] = lambda event: None,
    ) -> None:
        self.membership = Membership(range(members))
        self.paradigm = paradigm
        self.failure: Failed | None = None
        self.leases = leases
        self._epoch: int | None = None  # whose batches are handed out
        self._asking: set[int] = set()  # who has pushed, and wants a grant with its OK
        self._past_gate: set[int] = set()  # those of them that wait for nothing but the grant
        self._round = False  # whether gradients wait for their mean: some of them may be of who is gone
        self._on_loss, self._least = on_loss, least
        self._newcomers: dict[int, Join] = {}  # who waits to take part, by ticket
        self._prepared = False  # whether they may now
        self._lost = False  # somebody, since all have met
        self._met: tuple[tuple[int, int], ...] = ()  # who was there: ranks and generations
        self._record = record
        self.meeting = Meeting()

    @property
    def over(self) -> bool:
        """Whether all members have been here, and are gone."""
        return self.membership.over

    def refuses(self, push: Push) -> bool:
        """Whether ``push`` is of batches that have been taken back: then its gradient is not to be applied."""
        return self._stale(push.member, push.leases) is not None

    def is_new(self, push: Push, optimizer: int) -> bool:
        """Note ``push``, which is not refused; return whether it is to be applied.

        One that leaves its leases open is not, if who held them before has come as far with them.
        """
        return push.commits or self.leases is None or self.leases.note_part(push.leases, optimizer)

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
                return self._join_anew(message, now) if message.anew else self._join(message, now)
            case Withdraw():
                self._newcomers.pop(message.ticket, None)
                return []
            case Prepared():
                self._prepared = True
                return self._admit(now)
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
        return [Joined(member.rank, member.generation, message.ticket), *self._tell_failure(member.rank)]

    def _join_anew(self, message: Join, now: float) -> list[Reply]:
        if self._on_loss == "end":
            raise ValueError("nobody joins this run while it goes on: it is not elastic")
        if message.member != ANY:
            self.membership.check(message.member)
        self._newcomers[message.ticket] = message
        return self._admit(now)

    def _admit(self, now: float) -> list[Reply]:
        """Let those who have joined anew take part who can; a rank that is still here, once it has been lost."""
        replies: list[Reply] = []
        if self._prepared and self.failure is None:
            for ticket, one in list(self._newcomers.items()):
                rank = self.membership.further() if one.member == ANY else one.member
                if rank not in self.membership.present:
                    del self._newcomers[ticket]
                    replies += self._join(replace(one, member=rank), now)
        return replies

    def _remove(self, rank: int, now: float, because: str | None = None, lost: bool = False) -> list[Reply]:
        self.membership.remove(rank)
        self._record(events.Left(now, rank, lost))
        replies = [] if because is None else self._fail("error", because, now)
        self._asking.discard(rank)
        self._past_gate.discard(rank)
        replies += self._leave_gate(rank, now)
        replies += self._take_back(rank, now)  # after that: who gets them takes its place among those who are left
        self.meeting.leave(rank)
        return [*replies, *self._open_meeting(now), *self._admit(now)]

    def _lose(self, message: Lose, now: float) -> list[Reply]:
        rank, self._lost = message.member, True
        process = self.membership.present[rank].process
        text: str | None = f"rank {rank} (process {process}) is gone: it was killed, has crashed or hangs"
        left = len(self.membership.awaited) - 1
        if self._on_loss == "go on" and rank > 0:
            few = f"; {left} workers are left, fewer than min_workers={self._least}"
            text = text + few if text is not None and left < self._least else None
        return self._remove(rank, now, text, lost=True)

    # --- the gate ---------------------------------------------------------------------------------------------------

    def _push(self, message: Push, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        if self.leases is None and (message.leases or message.asks):
            raise ValueError(f"rank {message.member} has pushed for a batch, and nobody hands them out")
        stale = self._stale(message.member, message.leases)
        if stale is not None:  # it may have come again since
            return [Refused(message.member, stale)]
        if self.paradigm is None or message.member not in self.paradigm.clocks:
            raise ValueError(f"rank {message.member} has pushed before all have met")
        if message.asks:
            self._asking.add(message.member)
        self._round = self.paradigm.averages
        released = self.paradigm.push(message.member, now)  # before others have a batch for it, whom it would wait for
        granted = self._commit(message.member, message.leases if message.commits else (), now)
        return [*self._release(released, now), *granted]

    def _leave_gate(self, rank: int, now: float) -> list[Reply]:
        if self.paradigm is None or rank not in self.paradigm.clocks:
            return []
        return self._release(self.paradigm.leave(rank, now), now)

    def _release(self, ranks: Sequence[int], now: float) -> list[Reply]:
        assert self.paradigm is not None
        if self.failure is not None:  # who waits knows of it
            return []
        replies: list[Reply] = []
        if self._round and (ranks or not self.paradigm.clocks):
            self._round = False
            replies.append(RoundOver())
        for rank in ranks:
            if rank in self._asking:
                self._asking.remove(rank)
                self._past_gate.add(rank)
                replies += self._ask(rank, now)
            else:
                replies.append(self._released(rank, None, now))
        return replies

    def _released(self, rank: int, grant: Grant | None, now: float) -> Released:
        assert self.paradigm is not None
        lead = self.paradigm.lead(rank)
        self._record(events.Released(now, rank, lead))
        return Released(rank, self.paradigm.clocks[rank], lead, grant)

    def _set_thresholds(self, message: SetThresholds, now: float) -> list[Reply]:
        if self.paradigm is None:
            return [ThresholdsSet(message.member, "there is no paradigm here")]
        try:
            released = self.paradigm.set_thresholds(now, **message.thresholds)
        except ValueError as error:
            return [ThresholdsSet(message.member, str(error))]
        self._record(events.ThresholdsSet(now, self.paradigm.thresholds))
        granted = [] if self.leases is None else self._grants(self.leases.serve(), now)
        return [*self._release(released, now), *granted, ThresholdsSet(message.member, None)]

    # --- leases -----------------------------------------------------------------------------------------------------

    def _request(self, message: Request, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        if self.leases is None:
            raise ValueError(f"rank {message.member} asks for a batch, and nobody hands them out")
        stale = self._stale(message.member, (*message.leases, *message.kept))
        if stale is not None:
            return [Refused(message.member, stale)]
        self.leases.note_kept(message.kept)
        self.leases.note_steps(message.steps)
        try:
            if message.plan is not None:
                # who is at the next meeting already trains nothing before it; who comes later may come too late
                here = {rank for rank, generation in self._met if self.membership.speaks(rank, generation)}
                self.leases.open(message.plan, here - set(self.meeting.waiting))
                self._note_epoch(message.plan, now)
        except ValueError as error:
            return self._fail("error", f"rank {message.member} asks for a batch: {error}", now)
        granted = self._commit(message.member, message.leases, now)
        return [*granted, *self._ask(message.member, now)]

    def _note_epoch(self, plan: Plan, now: float) -> None:
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self._record(events.Planned(now, plan.epoch, plan.batches))

    def _stale(self, rank: int, leases: Sequence[int]) -> int | None:
        return None if self.leases is None else self.leases.stale(rank, leases)

    def _ask(self, rank: int, now: float) -> list[Reply]:
        """Have ``rank`` wait for a batch; if it waits for what others hold, nobody waits for its pushes meanwhile."""
        assert self.leases is not None
        granted = self._grants(self.leases.request(rank), now)
        if self.leases.waits_for_others(rank):
            granted += self._leave_gate(rank, now)
        return [*granted, *self._end_kept(now)]

    def _end_kept(self, now: float) -> list[Reply]:
        """Nobody is granted a batch any more for which a gradient would be kept: these are trained, as they are."""
        assert self.leases is not None
        return [reply for rank, leases in self.leases.kept_to_the_end() for reply in self._commit(rank, leases, now)]

    def _commit(self, rank: int, leases: Sequence[int], now: float) -> list[Reply]:
        if self.leases is None or not leases:
            return []
        for lease in leases:
            self._record(events.Committed(now, rank, lease))
        if self.paradigm is not None:
            self.paradigm.note_commit(rank, now)
        return self._grants(self.leases.commit(rank, leases), now)

    def _take_back(self, rank: int, now: float, stays: bool = False) -> list[Reply]:
        if self.leases is None:
            return []
        replies = self._commit(rank, self.leases.trained(rank, stays), now)
        for lease in self.leases.of(rank):
            self._record(events.TakenBack(now, rank, lease))
        replies += self._grants(self.leases.take_back(rank), now)
        return [*replies, *self._end_kept(now)]

    def _grants(self, grants: Grants, now: float) -> list[Reply]:
        if self.failure is not None:  # who waits knows of it
            return []
        replies: list[Reply] = []
        for rank, grant in grants:
            if not grant.over:
                self._record(events.Granted(now, rank, grant.lease, grant.first, grant.last))
            if self.paradigm is not None:
                if rank not in self.paradigm.clocks:
                    self.paradigm.join(rank, now)
                if not grant.over:
                    self.paradigm.note_grant(rank, now)
            if rank in self._past_gate:
                self._past_gate.remove(rank)
                replies.append(self._released(rank, grant, now))
            else:
                replies.append(Granted(rank, grant))
        return replies

    # --- meetings ---------------------------------------------------------------------------------------------------

    def _arrive(self, message: Arrive, now: float) -> list[Reply]:
        if self.failure is not None:
            return self._tell_failure(message.member)
        released = self._leave_gate(message.member, now)  # it pushes no more until all have met: nobody waits for it
        released += self._take_back(message.member, now, stays=True)  # what it has not begun: others may
        self.meeting.arrive(message.member, message.place, message.detail, message.region)
        return [*released, *self._open_meeting(now)]

    def _open_meeting(self, now: float) -> list[Reply]:
        if self.failure is not None:
            return []
        try:
            finished = self.membership.finished if self._on_loss == "end" else set()
            met = self.meeting.open(self.membership.awaited, finished, interrupted=self._lost)
        except DifferentPlacesError as error:
            return self._fail("error", str(error), now)
        if self.paradigm is None:
            thresholds: dict[str, int] = {}
        else:
            before = self.paradigm.thresholds
            for rank in met:
                self.paradigm.join(rank, now)
            thresholds = self.paradigm.thresholds
            if thresholds != before:  # they follow from how many take part
                self._record(events.ThresholdsSet(now, thresholds))
        for rank in met:
            self._record(events.Met(now, rank))
        if met:
            self._prepared = self._lost = False
            self._met = tuple((rank, self.membership.present[rank].generation) for rank in met)
        return [Met(rank, thresholds, self._met) for rank in met]

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
