"""In which order the messages of workers are taken: as they come, or as in a run that was recorded."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import TypeVar

from lightning_stale.events import Event, Fingerprint, Spent, Turn
from lightning_stale.events.kinds import What
from lightning_stale.recording.log import PER_S, turns

EventT = TypeVar("EventT", bound=Event)
_NOT_COMPARED = (Turn, Spent, Fingerprint)  # durations are measured anew; checksums are compared where they are made


class ReplayError(RuntimeError):
    """The run cannot be the one that was recorded, or is no more."""


class DiffersError(ReplayError):
    """The run has become another one than that of the record."""

    def __str__(self) -> str:
        return f"the replay differs from its record: {super().__str__()}"


class Turns:
    """Takes each message as it comes.

    All that follows from the messages of a run (who is released and granted what, and which weights each worker has
    when) follows from their order and the time of each, which the coordinator and the paradigm are told. So a run whose
    messages are taken in the order and at the times of another one is that one again.

    Args:
        clock: says what time it is, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def now(self) -> float:
        """Return the time, in seconds, that is told to whoever takes a message."""
        return self._clock()

    def take(self, worker: int, what: What, handle: Callable[[], object]) -> None:
        """Have ``handle`` called when it is the turn of this message.

        Args:
            worker: from which it is; -1: from one that joins as any.
            what: kind of message it is.
            handle: takes it.
        """
        handle()

    def lose(self, worker: int, handle: Callable[[], object]) -> None:
        """The connection of ``worker`` has ended: have ``handle`` called, if that is to be noted."""
        self.take(worker, "lost", handle)

    def expected(self, kind: type[EventT]) -> EventT | None:
        """Return what of this kind has followed from the message that is taken now, if that is known."""
        return None

    def awaited(self) -> str | None:
        """Return what all that has come waits for, if it waits."""
        return None

    def ended(self) -> None:
        """The run has failed: from now on the order does not matter."""


class RecordedTurns(Turns):
    """As they come, and the record has each turn: its time is a whole number of microseconds, as it is written.

    Args:
        record: is told.
        clock: as for :class:`Turns`.
    """

    def __init__(self, record: Callable[[Event], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._record = record
        self._at = self._read()

    def _read(self) -> float:
        return int(self._clock() * PER_S) / PER_S

    def now(self) -> float:
        return self._at

    def take(self, worker: int, what: What, handle: Callable[[], object]) -> None:
        self._at = self._read()
        self._record(Turn(self._at, worker, what))
        handle()


class ReplayedTurns(Turns):
    """In the order, and at the times, of a record; a message that comes before its turn waits.

    A worker that was lost is lost when it is its turn, whatever it does.

    Args:
        events: those of the record.
        record: is told of each turn.
        lose: is called with who is lost now.
        ahead: the same events once more, to compare what comes early: whoever does something else than in the record is
            found out at once. It may be what the others wait for without this process, before its turn ever comes.

    Example::

        >>> from lightning_stale.recording.turns import ReplayedTurns
        >>> from lightning_stale.events import Turn
        >>> record = [Turn(0.1, worker=1, what="push"), Turn(0.2, worker=0, what="push")]
        >>> turns = ReplayedTurns(record, lose=print)
        >>> turns.take(0, "push", lambda: print("0 at", turns.now()))
        >>> turns.take(1, "push", lambda: print("1 at", turns.now()))
        1 at 0.1
        0 at 0.2
    """

    def __init__(
        self,
        events: Iterable[Event],
        lose: Callable[[int], object],
        record: Callable[[Event], None] = lambda event: None,
        ahead: Iterable[Event] = (),
    ) -> None:
        super().__init__()
        self._ahead = (event for event in ahead if isinstance(event, Turn))
        self._coming: defaultdict[int, deque[What]] = defaultdict(deque)  # the turns of each that were read ahead
        self._turns: Iterator[tuple[Turn, list[Event]]] = turns(events)
        self._lose, self._record = lose, record
        self._follows: list[Event] = []  # from the turn that is taken
        self._early: defaultdict[int, deque[tuple[What, Callable[[], object]]]] = defaultdict(deque)
        self._at = 0.0
        self._followed: list[Event] = []
        self._taking = self._over = False
        self._took = ""
        self._next: Turn | None = None
        self._then: list[Event] = []
        self._advance()
        self._at = 0.0 if self._next is None else self._next.at

    def now(self) -> float:
        return self._at

    def expected(self, kind: type[EventT]) -> EventT | None:
        return next((event for event in self._followed if isinstance(event, kind)), None)

    def note(self, event: Event) -> None:
        """What follows from the turn that is taken, to be compared: see :class:`~lightning_stale.events.Recorder`."""
        if self._taking and not isinstance(event, _NOT_COMPARED):
            self._follows.append(event)

    def _compare(self, turn: str) -> None:
        """See that the same has followed as in the record; else somebody may wait for ever for what does not come."""
        theirs = [event for event in self._followed if not isinstance(event, _NOT_COMPARED)]
        if self._next is None:  # the record may be cut off in this turn
            theirs = theirs[: len(self._follows)]
            self._follows = self._follows[: len(theirs)]
        if self._follows == theirs:
            return
        pairs = zip_longest(self._follows, theirs)
        mine, other = next(pair for pair in pairs if pair[0] != pair[1])
        raise DiffersError(
            f"from {turn} follows {mine or 'nothing more'}, and in the record {other or 'nothing more'}: the script, "
            "its arguments (limit_train_batches, the batch size) or the data are others than those of the record"
        )

    def take(self, worker: int, what: What, handle: Callable[[], object]) -> None:
        if self._over:
            handle()
            return
        coming = self._what_comes(worker)
        if what == "abort" and coming not in ("abort", "lost", None):  # it says itself what is wrong: now, or the
            handle()  # others wait for it
            return
        if coming not in (what, "lost", None):
            raise DiffersError(
                f"rank {worker} has come to a {what!r} where in the record a {coming!r} of rank {worker} follows: the "
                "script, its arguments or the data are others than those of the record"
            )
        if coming == what:
            self._coming[worker].popleft()
        self._early[worker].append((what, handle))
        self._go_on()

    def _what_comes(self, worker: int) -> What | None:
        """Return what this worker does next in the record; ``None`` if that is not known."""
        coming = self._coming[worker]
        while not coming:
            turn = next(self._ahead, None)
            if turn is None:
                return None
            self._coming[turn.worker].append(turn.what)
        return coming[0]

    def lose(self, worker: int, handle: Callable[[], object]) -> None:
        if self._over:
            handle()
            return
        said = self._early.get(worker)
        if said and said[-1][0] in ("bye", "abort"):  # which has its turn yet
            return
        raise DiffersError(
            f"rank {worker} is gone, and in the record it is there: {self._what_is_next()}. What it printed is above"
        )

    def awaited(self) -> str | None:
        return self._what_is_next() if any(self._early.values()) else None

    def ended(self) -> None:
        self._over = True
        early, self._early = self._early, defaultdict(deque)
        for queue in early.values():
            for _, handle in queue:
                handle()

    def _go_on(self) -> None:
        while not self._taking and not self._over:
            handle = self._whose_turn_it_is()
            if handle is None:
                return
            self._taking, self._follows = True, []
            try:
                handle()
            finally:
                self._taking = False
            if self._took and not self._over:
                self._compare(self._took)

    def _whose_turn_it_is(self) -> Callable[[], object] | None:
        turn = self._next
        if turn is None:
            if any(self._early.values()):
                raise ReplayError("the record that is replayed ends here: nothing is known of what came then")
            return None
        if turn.what == "lost":
            self._early.pop(turn.worker, None)
            if self._what_comes(turn.worker) == "lost":
                self._coming[turn.worker].popleft()
            self._begin(turn)
            return lambda: self._lose(turn.worker)
        queue = self._early.get(turn.worker)
        if not queue:
            return None
        what, handle = queue[0]
        if what == "abort" != turn.what:  # it says itself what is wrong
            self._took = ""
            return queue.popleft()[1]
        if what != turn.what:
            raise DiffersError(
                f"rank {turn.worker} has come to a {what!r} where in the record {self._what_is_next()}: the script, "
                "its arguments or the data are others than those of the record"
            )
        queue.popleft()
        self._begin(turn)
        return handle

    def _begin(self, turn: Turn) -> None:
        self._at, self._followed = turn.at, self._then
        self._took = f"the {turn.what!r} of rank {turn.worker}"
        self._record(turn)
        self._advance()

    def _what_is_next(self) -> str:
        turn = self._next
        return "nothing follows" if turn is None else f"a {turn.what!r} of rank {turn.worker} follows"

    def _advance(self) -> None:
        self._next, self._then = next(self._turns, (None, []))
