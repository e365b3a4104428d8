"""Which worker has which batches of the epoch: handed out as leases, trained by the push that commits them."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

NONE_LEFT = -1
"""The number of the lease of who is told that no batch is left before the next meeting."""


@dataclass(frozen=True)
class Grant:
    """A worker may begin the batches ``first`` to ``last - 1`` of the epoch: those of one step of its optimizer.

    ``step`` says how far the epoch is, in steps of every worker; it is that of the next meeting once no batch is left.
    ``ahead`` are the batches that are kept for this worker, to fetch them meanwhile: an idle one may get them.
    Where workers say how often optimizers step in a batch, ``taken`` is how often they have in ``step`` steps, and
    ``most`` how often in one.
    """

    lease: int
    first: int
    last: int
    step: int
    ahead: tuple[int, ...] = ()
    taken: int = 0
    most: int = 0

    @property
    def over(self) -> bool:
        """Whether no batch is left before the next meeting."""
        return self.lease == NONE_LEFT

    @classmethod
    def of(cls, values: Sequence[Any]) -> Grant:
        """Return the grant whose fields came as a list."""
        lease, first, last, step, ahead, taken, most = values
        return cls(lease, first, last, step, tuple(ahead), taken, most)


Grants = list[tuple[int, Grant]]
"""Who is granted what, in order."""


class Leases(ABC):
    """Hands out batches, one lease each.

    A push carries the leases whose gradients it contains; to commit them is the only way in which a batch becomes
    trained. A lease that is taken back returns its batches, which are granted again under another number.
    """

    @abstractmethod
    def open(self, plan: Plan, members: Collection[int]) -> None:
        """Go on to the meeting of ``plan``, after all have met; asked again for the same, nothing happens.

        Args:
            plan: of the epoch that has begun, or goes on.
            members: who is here.

        Raises:
            ValueError: if another worker has another plan, or not all have done what was planned before.
        """

    @abstractmethod
    def of(self, member: int) -> list[int]:
        """Return the numbers of the leases that ``member`` holds."""

    @abstractmethod
    def request(self, member: int) -> Grants:
        """``member`` is free: return who is granted what for it, nobody if it has to wait."""

    @abstractmethod
    def stale(self, member: int, leases: Sequence[int]) -> int | None:
        """Return the first of ``leases`` that ``member`` does not hold (any more) or names twice, if there is one."""

    @abstractmethod
    def commit(self, member: int, leases: Sequence[int]) -> Grants:
        """Note that they are trained; return who is granted what for it.

        Raises:
            ValueError: if one is :meth:`stale`; then none is committed.
        """

    @abstractmethod
    def note_part(self, leases: Sequence[int], optimizer: int) -> bool:
        """Note a push of ``optimizer`` with gradients of ``leases``, which stay open: more of them may follow.

        Returns:
            Whether it is to be applied: not if who held these batches before has pushed as much of them.
        """

    @abstractmethod
    def note_steps(self, steps: int) -> None:
        """Note how often optimizers have stepped in a batch that is committed now."""

    @abstractmethod
    def note_kept(self, leases: Sequence[int]) -> None:
        """Note that these are computed, and that their holder keeps the gradients for a later push."""

    @abstractmethod
    def trained(self, member: int, stays: bool) -> list[int]:
        """Return which leases of ``member`` count as trained when the rest of its leases is taken back.

        Those that were pushed together with others, and if it ``stays``, those whose gradients it keeps.
        """

    @abstractmethod
    def kept_to_the_end(self) -> list[tuple[int, list[int]]]:
        """Return whose gradients are kept when no batch is left, and nobody is computing one: they become no push."""

    @abstractmethod
    def take_back(self, member: int) -> Grants:
        """Return the batches of ``member``, which is gone or begins none of them; return who is granted what for it."""

    @abstractmethod
    def serve(self) -> Grants:
        """Return who is granted what now that more may be granted at once."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what of the epoch is committed, as plain numbers, lists and dicts."""

    @abstractmethod
    def waits_for_others(self, member: int) -> bool:
        """Whether ``member`` has asked and no batch is left for it, but for those that others hold."""


@dataclass(frozen=True)
class Plan:
    """What is left of an epoch, and where the next meeting is; the same on all workers.

    Args:
        epoch: its number.
        batches: how many are left of it when this fit begins with it, over all workers.
        each: how many a step of the optimizer takes (``accumulate_grad_batches``).
        steps: how many steps each of equal workers takes for them.
        until: after how many of these all meet.
        prefetch: how many leases are kept for a worker beside the one that it has.
    """

    epoch: int
    batches: int
    each: int
    steps: int
    until: int
    prefetch: int = 0

    def check(self, workers: int) -> None:
        """Raise ``ValueError`` unless every worker has a batch in every step."""
        if not (
            self.each >= 1
            and 1 <= self.until <= self.steps
            and self.batches - (self.steps - 1) * self.each * workers >= workers
        ):
            raise ValueError(f"{self} cannot be shared by {workers} workers: each needs a batch in every step")


@dataclass(frozen=True)
class Division:
    """The batches of a plan, divided among the leases of ``workers`` that are equal.

    Every step but the last has one lease of ``each`` batches per worker. The last one shares out what is left: one
    lease per worker, of as many batches as all of them can have, and a few more where that leaves a remainder.

    Example::

        >>> from lightning_stale.coordinator.leases import Division, Plan
        >>> division = Division(Plan(epoch=0, batches=15, each=3, steps=2, until=2), workers=2)
        >>> [division.batches(number) for number in range(division.leases)]
        [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)]
    """

    plan: Plan
    workers: int

    @cached_property
    def _full(self) -> int:
        return (self.plan.steps - 1) * self.workers

    @cached_property
    def _rest(self) -> int:
        return self.plan.batches - self._full * self.plan.each

    @cached_property
    def _size(self) -> int:
        return min(self.plan.each, self._rest // self.workers)

    @cached_property
    def leases(self) -> int:
        """How many there are."""
        return self._full - (-self._rest // self._size)

    def end(self, step: int) -> int:
        """Return how many leases there are until the end of ``step`` (counted from one)."""
        return self.leases if step == self.plan.steps else step * self.workers

    def batches(self, number: int) -> tuple[int, int]:
        """Return the first batch of a lease, and the one after its last."""
        if number < self._full:
            return number * self.plan.each, (number + 1) * self.plan.each
        first = self._full * self.plan.each + (number - self._full) * self._size
        return first, min(first + self._size, self.plan.batches)


class EpochLeases(Leases):
    """The batches of an epoch, in order, until the next meeting; every worker gets some before it.

    Leases are numbered as they are granted, over the whole fit. What is kept for a worker, which fetches it already, is
    no lease yet: when nothing else is left, it is granted to who is idle. Who finds no batch left waits until all that
    others hold are committed, as one may come back; then all are told that none is left.

    Args:
        workers: how many the run was started with: progress is counted in steps of so many.
        allows: whether a lease with this number may be granted while the oldest that is open has that one.

    Example::

        >>> from lightning_stale.coordinator.leases import EpochLeases, Plan
        >>> leases = EpochLeases(workers=2)
        >>> leases.open(Plan(epoch=0, batches=3, each=1, steps=1, until=1), members={0, 1})
        >>> leases.request(0)
        [(0, Grant(lease=0, first=0, last=1, step=0, ahead=(), taken=0, most=0))]
        >>> leases.commit(0, [0]), leases.request(0)
        ([], [(0, Grant(lease=1, first=1, last=2, step=0, ahead=(), taken=0, most=0))])
        >>> leases.commit(0, [1]), leases.request(0)   # the last one is kept for worker 1
        ([], [])
        >>> leases.request(1)
        [(1, Grant(lease=2, first=2, last=3, step=0, ahead=(), taken=0, most=0))]
        >>> leases.commit(1, [2])
        [(0, Grant(lease=-1, first=3, last=3, step=1, ahead=(), taken=0, most=0))]
    """

    def __init__(self, workers: int, allows: Callable[[int, int], bool] = lambda lease, oldest: True) -> None:
        self._workers, self._allows = workers, allows
        self._division: Division | None = None
        self._end = 0  # how many leases of it there are until the next meeting
        self._fresh = 0  # the first that nobody has had
        self._returned: deque[int] = deque()
        self._kept: dict[int, deque[int]] = {}  # for which member, in the order in which it gets them
        self._kept_count = 0
        self._robbed: list[tuple[int, int, int]] | None = None  # a heap of who has most kept for it: -count, place
        # ordered ones know their first at once, whatever has been taken out before it
        self._held: OrderedDict[int, tuple[int, int]] = OrderedDict()  # lease -> member, which one of the division
        self._committed: set[int] = set()  # of the division, beyond those before _prefix
        self._prefix = 0  # so many from the first on are committed
        self._line: OrderedDict[int, None] = OrderedDict()  # who has asked and waits, oldest first
        self._owed: set[int] = set()  # who has had none since the last meeting
        self._owed_line: OrderedDict[int, None] = OrderedDict()  # those of them that wait, oldest first
        self._next = 0
        self._parts: dict[int, Counter[int]] = {}  # of an open lease: its pushes by optimizer
        self._pushed: dict[int, Counter[int]] = {}  # the same of one of the division, whoever has held it
        self._jointly: set[int] = set()  # open leases that were pushed together with others
        self._kept_back: set[int] = set()  # open leases whose gradients their holders keep
        self._taken = self._most = 0  # the steps of optimizers: in the epoch, and in one batch

    @property
    def plan(self) -> Plan | None:
        """The epoch's; ``None`` before the first."""
        return None if self._division is None else self._division.plan

    @property
    def held(self) -> Mapping[int, tuple[int, int]]:
        """The open leases: number to member, and which one of the division it is."""
        return self._held

    @property
    def committed(self) -> int:
        """How many leases of the division are committed."""
        return self._prefix + len(self._committed)

    @property
    def left(self) -> int:
        """How many leases nobody has, until the next meeting."""
        return self._end - self._fresh + len(self._returned) + self._kept_count

    @property
    def step(self) -> int:
        """How far the epoch is, in steps of every worker, the one that has begun included.

        So equal workers in turn are told what shards would tell them. The last step before a meeting is over when all
        of its leases are committed.
        """
        if self._division is None:
            return 0
        until = self._division.plan.until
        return until if self.committed >= self._end else min(-(-self.committed // self._workers), until - 1)

    def open(self, plan: Plan, members: Collection[int]) -> None:
        if plan == self.plan:
            return
        before = self.plan
        if before is not None and self.committed < self._end:
            raise ValueError(f"a worker goes on with {plan} amid {before}: all must have the same batches per epoch")
        plan.check(self._workers)
        if before is None or before.epoch < plan.epoch:
            self._fresh = self._prefix = self._taken = 0
        elif replace(before, until=plan.until) != plan or plan.until < before.until:
            raise ValueError(f"{plan} does not follow {before}: all must have the same batches per epoch")
        self._division = Division(plan, self._workers)
        self._end = self._division.end(plan.until)
        self._owed = set(members)
        self._owed_line = OrderedDict.fromkeys(member for member in self._line if member in self._owed)

    def of(self, member: int) -> list[int]:
        return [lease for lease, (holder, _) in self._held.items() if holder == member]

    def request(self, member: int) -> Grants:
        if member in self._line:
            raise ValueError(f"worker {member} asks for a batch while it waits for one")
        self._line[member] = None
        if member in self._owed:
            self._owed_line[member] = None
        return self.serve()

    def stale(self, member: int, leases: Sequence[int]) -> int | None:
        for place, lease in enumerate(leases):
            if lease in leases[:place] or self._held.get(lease, (None, 0))[0] != member:
                return lease
        return None

    def commit(self, member: int, leases: Sequence[int]) -> Grants:
        stale = self.stale(member, leases)
        if stale is not None:
            raise ValueError(f"worker {member} commits {list(leases)}, and does not hold lease {stale} (any more)")
        for lease in leases:
            number = self._let_go(lease)
            self._pushed.pop(number, None)
            self._committed.add(number)
        while self._prefix in self._committed:
            self._committed.remove(self._prefix)
            self._prefix += 1
        return self.serve() if leases else []

    def take_back(self, member: int) -> Grants:
        kept = self._kept.pop(member, ())
        self._kept_count -= len(kept)
        mine = [*kept, *(self._let_go(lease) for lease in self.of(member))]
        self._returned.extendleft(sorted(mine, reverse=True))
        self._leave_line(member)
        self._owed.discard(member)
        return self.serve()

    def _let_go(self, lease: int) -> int:
        self._parts.pop(lease, None)
        self._jointly.discard(lease)
        self._kept_back.discard(lease)
        return self._held.pop(lease)[1]

    def note_part(self, leases: Sequence[int], optimizer: int) -> bool:
        new = not leases
        for lease in leases:
            mine = self._parts.setdefault(lease, Counter())
            all_of_it = self._pushed.setdefault(self._held[lease][1], Counter())
            mine[optimizer] += 1
            new = new or mine[optimizer] > all_of_it[optimizer]
            all_of_it[optimizer] = max(mine[optimizer], all_of_it[optimizer])
        if len(leases) > 1:
            self._jointly.update(leases)
        return new

    def note_steps(self, steps: int) -> None:
        self._taken += steps
        self._most = max(self._most, steps)

    def note_kept(self, leases: Sequence[int]) -> None:
        self._kept_back.update(leases)

    def trained(self, member: int, stays: bool) -> list[int]:
        return [lease for lease in self.of(member) if lease in self._jointly or (stays and lease in self._kept_back)]

    def kept_to_the_end(self) -> list[tuple[int, list[int]]]:
        waiting = (lease in self._kept_back and holder in self._line for lease, (holder, _) in self._held.items())
        if self.left or not all(waiting):
            return []
        return [(member, leases) for member in self._line if (leases := self.of(member))]

    def waits_for_others(self, member: int) -> bool:
        return member in self._line and self.left <= self._kept_from(member)

    def serve(self) -> Grants:
        grants: Grants = []
        while True:
            for member in (self._first_in_line(), self._waits_for_itself()):
                grant = None if member is None else self._grant(member)
                if member is not None and grant is not None:
                    self._leave_line(member)
                    grants.append((member, grant))
                    break
            else:
                return grants

    def _waits_for_itself(self) -> int | None:
        """Return who waits in line and has the oldest open lease itself, whose gradient it keeps for a later push."""
        oldest = next(iter(self._held), None)
        if oldest is None or oldest not in self._kept_back:
            return None
        holder = self._held[oldest][0]
        return holder if holder in self._line else None

    def _first_in_line(self) -> int | None:
        """Return who is granted something before all others who wait; if it is not, nobody is."""
        only_owed = 0 < self.left <= len(self._owed)
        return next(iter(self._owed_line if only_owed else self._line), None)

    def _leave_line(self, member: int) -> None:
        self._line.pop(member, None)
        self._owed_line.pop(member, None)

    def _kept_from(self, member: int) -> int:
        """How many leases are for others, who have had none; among these who comes first gets one, if it is too few."""
        return 0 if member in self._owed else len(self._owed)

    def _grant(self, member: int) -> Grant | None:
        if self.left == 0:
            return self._none_left()
        oldest = next(iter(self._held), self._next)
        own = self._waits_for_itself() == member
        if self.left <= self._kept_from(member) or not (own or self._allows(self._next, oldest)):
            return None
        assert self._division is not None
        lease, self._next = self._next, self._next + 1
        number = self._take(member)
        self._held[lease] = (member, number)
        self._owed.discard(member)
        kept = self._keep(member, self._division.plan.prefetch)
        ahead = (range(*self._division.batches(number)) for number in kept)
        batches = self._division.batches(number)
        return Grant(lease, *batches, self.step, tuple(chain.from_iterable(ahead)), *self._optimizer_steps)

    def _none_left(self) -> Grant | None:
        """Return what is told to who asks when no batch is left; nothing, as long as one may come back."""
        if self._held or self._division is None:  # or nobody has said what there is
            return None
        end = self._division.plan.batches
        return Grant(NONE_LEFT, end, end, self.step, (), *self._optimizer_steps)

    @property
    def _optimizer_steps(self) -> tuple[int, int]:
        return self._taken * self.step // max(self.committed, 1), self._most

    def _take(self, member: int) -> int:
        """Return which one ``member`` gets: what is kept for it, what nobody has, or another's that begins it last."""
        if self._kept.get(member):
            self._kept_count -= 1
            return self._kept[member].popleft()
        if self._untouched:
            return self._pop()
        self._kept_count -= 1
        return self._rob().pop()

    def _keep(self, member: int, count: int) -> Iterable[int]:
        kept = self._kept.setdefault(member, deque())
        while len(kept) < count and self._untouched:
            kept.append(self._pop())
            self._kept_count += 1
            self._robbed = None
        return kept

    def _rob(self) -> deque[int]:
        """Return what is kept for who has most of it; of several, for the first for whom something was.

        While nobody gets more, the heap made at first stays right but for who has less by now.
        """
        if self._robbed is None:
            each = enumerate(self._kept.items())
            self._robbed = [(-len(kept), place, member) for place, (member, kept) in each if kept]
            heapq.heapify(self._robbed)
        while True:
            count, place, member = self._robbed[0]
            kept = self._kept.get(member)
            if kept and len(kept) == -count:
                return kept
            if kept:
                heapq.heapreplace(self._robbed, (-len(kept), place, member))
            else:
                heapq.heappop(self._robbed)

    @property
    def _untouched(self) -> bool:
        return bool(self._returned) or self._fresh < self._end

    def _pop(self) -> int:
        if self._returned:
            return self._returned.popleft()
        self._fresh += 1
        return self._fresh - 1

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return which batches are committed, as ranges of what was left of the epoch when this fit began with it."""
        if self._division is None:
            return {"plan": None, "committed": []}
        numbers = [*range(self._prefix), *sorted(self._committed)]
        return {
            "plan": asdict(self._division.plan),
            "committed": merged(self._division.batches(number) for number in numbers),
        }


def merged(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return ranges that follow each other as one.

    Example::

        >>> from lightning_stale.coordinator.leases import merged
        >>> merged([(0, 2), (2, 4), (6, 7)])
        [[0, 4], [6, 7]]
    """
    result: list[list[int]] = []
    for first, last in ranges:
        if result and result[-1][1] == first:
            result[-1][1] = last
        else:
            result.append([first, last])
    return result
