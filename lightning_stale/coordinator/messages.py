"""What the coordinator is told, and what it answers: plain values, of which the loop around it makes messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.failures import FailureKind

ANY = -1
"""Joins as the rank that is given to it."""

# --- what it is told ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """``member`` is here; ``process`` says which process it is, for who reads of its end.

    ``anew``: while the run goes on, for a member that was lost, or (``member`` is -1) as a further one. It takes part
    as soon as it can: ``ticket`` is in the answer, by which it is known until then.
    """

    member: int
    process: int
    anew: bool = False
    ticket: int = 0


@dataclass(frozen=True)
class Withdraw:
    """Who has joined anew, with this ticket, waits no more to take part."""

    ticket: int


@dataclass(frozen=True)
class Prepared:
    """From now until all meet next, who joins anew can begin as one who has been slow since they last met."""


@dataclass(frozen=True)
class _FromMember:
    """From a member that has joined as ``generation``, and not from one that it has been fenced as."""

    member: int
    generation: int


@dataclass(frozen=True)
class Request(_FromMember):
    """It is free and asks for a batch, of the epoch that ``plan`` says if it is the first since the last meeting.

    These ``leases`` of its own count as trained: all pushes with their gradients have come, if there are any. In the
    batch that is over, optimizers have stepped so many ``steps``. Of those ``kept``, a later push has the gradients.
    """

    leases: tuple[int, ...] = ()
    plan: Plan | None = None
    kept: tuple[int, ...] = ()
    steps: int = 0


@dataclass(frozen=True)
class Push(_FromMember):
    """Its gradient, of the batches of these leases, has come; with its OK it wants to be granted the next, or not.

    It commits them, or leaves them open: others of its optimizers may step too, before the batch is over.
    """

    leases: tuple[int, ...] = ()
    asks: bool = False
    commits: bool = True


@dataclass(frozen=True)
class Arrive(_FromMember):
    """It is at the meeting point ``place`` (``detail``: what an error says besides) and waits for the others.

    ``region``: what is void if somebody is lost in it, where who notices does not come to the place of the others.
    """

    place: str
    detail: str = ""
    region: str = ""


@dataclass(frozen=True)
class SetThresholds(_FromMember):
    """It wants other thresholds."""

    thresholds: Mapping[str, int]


@dataclass(frozen=True)
class Abort(_FromMember):
    """It fails, for a reason that all others are to hear."""

    kind: FailureKind
    text: str


@dataclass(frozen=True)
class Leave(_FromMember):
    """It has finished."""


@dataclass(frozen=True)
class Lose(_FromMember):
    """Its connection has ended, without a word."""


@dataclass(frozen=True)
class Fail:
    """Something that all depend on has failed."""

    text: str


FromMember = Request | Push | Arrive | SetThresholds | Abort | Leave | Lose
Message = Join | Withdraw | Prepared | FromMember | Fail

# --- what it answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """``member`` takes part, as ``generation``."""

    member: int
    generation: int
    ticket: int = 0


@dataclass(frozen=True)
class Fenced:
    """``member`` speaks for a generation that is over: nothing has been changed."""

    member: int
    generation: int


@dataclass(frozen=True)
class Granted:
    """``member`` may begin the batches of ``grant``, or is told that none is left."""

    member: int
    grant: Grant


@dataclass(frozen=True)
class Refused:
    """The push of ``member`` holds a lease that was taken back: it is not to be applied."""

    member: int
    lease: int


@dataclass(frozen=True)
class Released:
    """``member`` gets its OK: with this clock, so many clocks ahead of the slowest; with a grant if it has asked."""

    member: int
    clock: int
    lead: int
    grant: Grant | None = None


@dataclass(frozen=True)
class RoundOver:
    """All whose gradients are averaged have pushed: the mean is due, whoever gets its OK when."""

    member: int = -1


@dataclass(frozen=True)
class Met:
    """All have come to the place where ``member`` is: rank and generation of each, in order."""

    member: int
    thresholds: Mapping[str, int]
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ThresholdsSet:
    """They hold from now on; or the text says what is wrong with them."""

    member: int
    problem: str | None


@dataclass(frozen=True)
class Failed:
    """``member`` is to end, because of what has failed first."""

    member: int
    kind: FailureKind
    text: str


@dataclass(frozen=True)
class Aborted:
    """``member`` has been heard; ``cause`` is what had failed before, if anything had."""

    member: int
    cause: str


Reply = Joined | Fenced | Granted | Refused | RoundOver | Released | Met | ThresholdsSet | Failed | Aborted
