"""The interface of a paradigm, and the clock gate that the four paradigms share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_stale.paradigms.clocks import Clocks
from lightning_stale.paradigms.waiting import Waiting


class Paradigm(ABC):
    """Decides when a worker that has pushed a gradient gets its OK.

    A paradigm is a deterministic state machine over clocks and times. It knows nothing of tensors, processes or
    networks, and never reads a clock of its own: every call says what time it is. The clock ``t_p`` of worker ``p`` is
    the number of its pushes, counted from where it joined; its *lead* is ``t_p - min(t)`` over the workers present.
    """

    averages: ClassVar[bool] = False
    """True: the gradients of a round are collected and applied as one step with their mean (BSP)."""

    @property
    @abstractmethod
    def clocks(self) -> Mapping[int, int]:
        """The clock of every worker that is present."""

    @abstractmethod
    def join(self, worker: int, now: float) -> None:
        """Let ``worker`` take part from ``now`` (seconds) on, with the smallest clock of those present."""

    @abstractmethod
    def push(self, worker: int, now: float) -> list[int]:
        """Count a push; return who gets an OK now: the pusher first, then those that waited, oldest first."""

    @abstractmethod
    def leave(self, worker: int, now: float) -> list[int]:
        """Drop ``worker`` from every minimum and round; return who gets an OK for it, oldest first."""

    def allows(self, lease: int, oldest: int) -> bool:
        """Whether the lease with this number may be granted while the oldest that is open has the number ``oldest``.

        Leases are numbered in the order in which they are granted; where data is not handed out, nobody asks.
        """
        return True

    def note_grant(self, worker: int, now: float) -> None:  # noqa: B027  # mostly nobody wants to know
        """``worker`` has been granted a lease, and begins it."""

    def note_commit(self, worker: int, now: float) -> None:  # noqa: B027  # likewise
        """The lease of ``worker`` is committed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was taken."""

    @property
    def thresholds(self) -> dict[str, int]:
        """What :meth:`set_thresholds` can change, under the names of the constructor; empty if there is nothing."""
        return {}

    @property
    def adapts(self) -> bool:
        """Whether :attr:`thresholds` change by themselves, as long as nobody sets them."""
        return False

    def set_thresholds(self, now: float, /, **thresholds: int) -> list[int]:
        """Change some or all of :attr:`thresholds` from ``now`` (seconds) on.

        Where a threshold rises, workers that it lets go on get their OK at once. Where one falls, nobody is called
        back: a worker that is too far ahead waits after its next push until the others have caught up. So every OK
        given before has a lead within the old bound, and every one given from now on, by this call too, within the new.

        Thresholds are no part of :meth:`state_dict`.

        Returns:
            Who gets an OK for it, oldest first.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for a value that its constructor would refuse; then
                nothing has changed.
        """
        name, known = type(self).__name__, self.thresholds
        if not known:
            raise ValueError(
                f"{name} has no threshold to change: use ssp or dssp, or bounded-delay, "
                "e.g. StaleSyncStrategy(paradigm=SSP(threshold=3))"
            )
        if not thresholds or not thresholds.keys() <= known.keys():
            given = ", ".join(f"{key}={value!r}" for key, value in thresholds.items())
            example = ", ".join(f"{key}={value}" for key, value in known.items())
            raise ValueError(
                f"set_thresholds({given}): {name} has {' and '.join(known)}, e.g. set_thresholds({example})"
            )
        return self._change_thresholds(now, {**known, **thresholds})

    def follow_thresholds(self, thresholds: Mapping[str, int]) -> None:
        """Show :attr:`thresholds` that are in force where the workers are, in a copy that no worker joins."""
        self.set_thresholds(0.0, **thresholds)

    def _change_thresholds(self, now: float, thresholds: Mapping[str, int]) -> list[int]:
        """Take all thresholds; paradigms that have some say how."""
        raise NotImplementedError

    def lead(self, worker: int) -> int:
        """Return ``t_p - min(t)`` of a worker that is present."""
        return self.clocks[worker] - min(self.clocks.values())


class ClockGate(Paradigm):
    """A paradigm that holds a worker back while its lead is above :attr:`bound` (SSP; Ho et al., NIPS 2013)."""

    bound: float = math.inf

    def __init__(self) -> None:
        self._clocks = Clocks()
        self._waiting = Waiting()
        self._last_clock = 0

    @property
    def clocks(self) -> Mapping[int, int]:
        return self._clocks

    def join(self, worker: int, now: float) -> None:
        """See :meth:`Paradigm.join`; where nobody is present, the clock goes on from the largest one so far."""
        if worker in self._clocks:
            raise ValueError(f"worker {worker} joined twice; it must leave before it joins again")
        self._clocks.join(worker, self._clocks.smallest if self._clocks else self._last_clock)

    def push(self, worker: int, now: float) -> list[int]:
        if worker not in self._clocks:
            raise ValueError(f"worker {worker} pushed without having joined; present: {sorted(self._clocks)}")
        if worker in self._waiting:
            raise ValueError(f"worker {worker} pushed while it waits for the OK of its last push")
        clock = self._clocks.advance(worker)
        self._last_clock = max(self._last_clock, clock)
        if self._opens(worker, now):
            return [worker, *self._open_waiting(now)]
        released = self._open_waiting(now)
        self._waiting.add(worker, clock)
        return released

    def leave(self, worker: int, now: float) -> list[int]:
        if worker not in self._clocks:
            raise ValueError(f"worker {worker} left without having joined; present: {sorted(self._clocks)}")
        self._clocks.leave(worker)
        self._waiting.drop(worker)
        return self._open_waiting(now)

    def state_dict(self) -> dict[str, Any]:
        return {"clocks": dict(self._clocks), "waiting": list(self._waiting), "last_clock": self._last_clock}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._clocks, self._waiting = Clocks(), Waiting()
        for worker, clock in state["clocks"].items():
            self._clocks.join(int(worker), int(clock))
        for worker in state["waiting"]:
            self._waiting.add(int(worker), self._clocks[int(worker)])
        self._last_clock = int(state["last_clock"])

    def lead(self, worker: int) -> int:
        return self._clocks[worker] - self._clocks.smallest

    def _opens(self, worker: int, now: float) -> bool:
        """Whether the gate is open for ``worker``, which has just pushed."""
        return self._within_bound(worker)

    def _within_bound(self, worker: int) -> bool:
        return self.lead(worker) <= self.bound

    def _open_waiting(self, now: float) -> list[int]:
        return self._waiting.release(self._clocks.smallest + self.bound)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def check_clock_count(owner: str, name: str, value: object) -> int:
    """Return ``value`` if it is a number of clocks, i.e. an integer >= 0; otherwise say what to write."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{owner}({name}={value!r}): {name} counts clocks and must be an integer >= 0, e.g. {owner}({name}=3)"
        )
    return value
