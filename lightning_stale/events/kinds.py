"""The kinds of events. A new one is a class here, a line where it happens, and a case in each reader that wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_stale.failures import FailureKind


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened ``at`` a time, in seconds of the recording process's monotonic clock."""

    at: float


# --- the order in which all else follows -----------------------------------------------------------------------------

What = Literal[
    "hello", "push", "change", "pull", "request", "sync", "deposit", "deposited", "thresholds", "optimizer_state",
    "snapshot", "progress", "abort", "bye", "lost",
]  # fmt: skip
"""The messages of a worker whose order decides what becomes of a run; ``lost`` is that its connection has ended."""


@dataclass(frozen=True, slots=True)
class Turn(Event):
    """A message of a worker is taken now; what is recorded from here to the next turn follows from it.

    ``worker`` is -1 where one that joins while the run goes on is any.
    """

    worker: int
    what: What


# --- membership and meetings ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined(Event):
    """A worker takes part."""

    worker: int


@dataclass(frozen=True, slots=True)
class Left(Event):
    """A worker has finished, or was lost."""

    worker: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Met(Event):
    """All were at the same meeting point, and a worker goes on from there."""

    worker: int


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The run has failed."""

    kind: FailureKind
    text: str


# --- bounded staleness ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pushed(Event):
    """A worker's gradient has come, whose weights were ``staleness`` updates old."""

    worker: int
    staleness: int


@dataclass(frozen=True, slots=True)
class Fingerprint(Event):
    """What the gradient of a push was: checksums of all of it, of its optimizer's options, and a byte per parameter."""

    worker: int
    gradients: int
    options: int
    parameters: bytes


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """The apply rule has let a worker's gradient go, so that it is no update."""

    worker: int


@dataclass(frozen=True, slots=True)
class Updated(Event):
    """The weights have had this many updates."""

    updates: int


@dataclass(frozen=True, slots=True)
class Released(Event):
    """A worker has its OK, ``lead`` clocks ahead of the slowest."""

    worker: int
    lead: int


@dataclass(frozen=True, slots=True)
class ThresholdsSet(Event):
    """The paradigm has these thresholds from now on."""

    thresholds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Spent(Event):
    """A worker has waited and computed for so many seconds since its last message."""

    worker: int
    wait_s: float
    compute_s: float


# --- data on demand -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """From now on, batches of this epoch are handed out; so many are left of it as the fit begins with it."""

    epoch: int
    batches: int


@dataclass(frozen=True, slots=True)
class Granted(Event):
    """A worker may begin the batches ``first`` to ``last - 1`` of the epoch, under a lease."""

    worker: int
    lease: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Committed(Event):
    """The batches of a worker's lease are trained."""

    worker: int
    lease: int


@dataclass(frozen=True, slots=True)
class TakenBack(Event):
    """The batches of a worker's lease will be another's."""

    worker: int
    lease: int


# --- averaging ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """The inner optimizer of this rank has taken a step."""


@dataclass(frozen=True, slots=True)
class Exchanged(Event):
    """A sum over the ranks was here ``exchange_s`` seconds after its launch; this rank has waited ``wait_s`` for it."""

    exchange_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class RoundEnded(Event):
    """The mean change of a round is in the global weights."""


# --- pipeline -------------------------------------------------------------------------------------------------------


Travels = Literal["features", "gradients"]


@dataclass(frozen=True, slots=True)
class StageRan(Event):
    """A stage has run the forward or the backward of a batch (counted from the last drain) for ``busy_s`` seconds.

    Batches that are evaluated are counted by themselves.
    """

    stage: int
    batch: int
    work: Literal["forward", "backward", "evaluation"]
    busy_s: float


@dataclass(frozen=True, slots=True)
class Received(Event):
    """A stage has got what it needs of a training batch, after ``wait_s`` seconds; it found ``queued`` messages there.

    With 0 it had to wait.
    """

    stage: int
    batch: int
    what: Travels
    wait_s: float
    queued: int


@dataclass(frozen=True, slots=True)
class Sent(Event):
    """A stage has passed on something of a training batch, after ``wait_s`` seconds: the queue there may be full."""

    stage: int
    batch: int
    what: Travels
    wait_s: float


@dataclass(frozen=True, slots=True)
class Elapsed(Event):
    """This rank has trained for so many seconds, from its first batch after a meeting to the end of the next one."""

    elapsed_s: float
