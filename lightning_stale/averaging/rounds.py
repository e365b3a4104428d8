"""Rounds: training goes on while the average of the last changes is on its way (HPSGD, arXiv 2009.02701)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale import events
from lightning_stale.averaging.merge import Merge, hpsgd
from lightning_stale.averaging.round_tensors import by_type

Interval = int | Literal["auto"]


class Reducer(ABC):
    """Sums tensors over the ranks while the caller goes on."""

    @abstractmethod
    def launch(self, tensors: Sequence[Tensor]) -> None:
        """Begin to sum each of ``tensors`` over the ranks, in place."""

    @abstractmethod
    def done(self) -> bool:
        """Whether all sums of the last launch are there."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until they are."""


class Rounds:
    """The rounds of one rank.

    Round 0 takes one step (``"auto"``) or ``interval`` steps, and launches the sum of ``D_0``. A later round ``k`` ends
    when the sum of ``D_{k-1}`` is there (``"auto"``), or after ``interval`` steps, when it waits for it. Then, with the
    replica ``x``::

        D_k = (x at launch) - x;   W_k = outer(W_{k-1}, mean D_{k-1});   x = merge(W_k, D_k);   launch the sum of D_k

    Args:
        parameters: the model's, which the inner optimizer changes: the replica.
        reducer: sums over the ranks.
        world_size: the number of ranks, ``N``.
        interval: ``"auto"`` or steps per round.
        merge: what the replica becomes.
        outer: makes the optimizer of the global weights from their list; ``None``: plain subtraction.
        record: is told what happens.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        reducer: Reducer,
        world_size: int,
        interval: Interval,
        merge: Merge,
        outer: Callable[[list[torch.nn.Parameter]], Optimizer] | None = None,
        record: Callable[[events.Event], None] = lambda event: None,
    ) -> None:
        self._tensors = by_type(parameters)
        self._reducer = reducer
        self._world_size = world_size
        self._interval = interval
        self._merge = merge
        self._counts = torch.zeros(2, dtype=torch.int64, device=parameters[0].device)  # flushing ranks, steps
        self._in_flight = False
        self._launched_at = 0.0
        self._steps = 0  # of this round
        self._record = record
        self.outer: Optimizer | None = None
        if outer is not None:
            self._global = [[torch.nn.Parameter(part) for part in tensors.weights.parts] for tensors in self._tensors]
            of_type = {
                tensors.weights.flat.dtype: iter(made)
                for tensors, made in zip(self._tensors, self._global, strict=True)
            }
            self.outer = outer([next(of_type[parameter.dtype]) for parameter in parameters])
            if not isinstance(self.outer, Optimizer):
                raise TypeError(f"outer_optimizer returned {self.outer!r}: write what returns a torch.optim.Optimizer")

    def note_step(self) -> None:
        """Call instead of :meth:`after_step` where :meth:`flush` comes next."""
        self._steps += 1
        self._record(events.Stepped(time.perf_counter()))

    @torch.no_grad()
    def after_step(self) -> bool:
        """Call after every step of the inner optimizer.

        Returns:
            Whether a round has begun: all changes of before are on their way, and those that were, have been averaged.
        """
        self.note_step()
        if not self._in_flight:  # round 0
            if self._interval == "auto" or self._steps >= self._interval:
                self._take_changes()
                self._go_on(None)  # nothing has arrived to merge with
                self._launch()
                return True
        elif self._reducer.done() if self._interval == "auto" else self._steps >= self._interval:
            self._wait()
            self._apply()
            self._take_changes()
            self._go_on(self._merge)
            self._launch()
            return True
        return False

    @torch.no_grad()
    def flush(self) -> None:
        """Have every change of every rank in the global weights, and these in the replica, on all ranks.

        Ranks come here in different rounds. Every sum carries how many ranks are flushing; one that flushes goes on
        taking part, with a zero change once it has sent what it had, until a round in which all are. A sum to which
        nobody has brought a step is no round: the momentum of an outer optimizer would move the weights.
        """
        if self._in_flight:
            self._wait()
            self._apply()
        self._take_changes()
        while True:
            self._launch(flushing=True)
            self._wait()
            flushing, steps = self._counts.tolist()
            if steps > 0:
                self._apply()
            if flushing == self._world_size:
                break
            for tensors in self._tensors:
                tensors.change.flat.zero_()
        self._go_on(hpsgd)

    def _take_changes(self) -> None:
        for tensors in self._tensors:
            tensors.take_change()

    def _go_on(self, merge: Merge | None) -> None:
        for tensors in self._tensors:
            tensors.go_on(merge)

    def _launch(self, flushing: bool = False) -> None:
        self._counts.copy_(torch.tensor([int(flushing), self._steps]))
        self._steps = 0
        self._reducer.launch([*(tensors.change.flat for tensors in self._tensors), self._counts])
        self._launched_at = time.perf_counter()
        self._in_flight = True

    def _wait(self) -> None:
        started = time.perf_counter()
        self._reducer.wait()
        now = time.perf_counter()
        self._record(events.Exchanged(now, exchange_s=now - self._launched_at, wait_s=now - started))
        self._in_flight = False

    def _apply(self) -> None:
        """Take the mean of the changes that have arrived into the global weights."""
        self._record(events.RoundEnded(time.perf_counter()))
        if self.outer is None:
            for tensors in self._tensors:
                tensors.weights.flat.sub_(tensors.change.flat, alpha=1 / self._world_size)
            return
        for tensors, made in zip(self._tensors, self._global, strict=True):
            tensors.change.flat.div_(self._world_size)
            for parameter, gradient in zip(made, tensors.change.parts, strict=True):
                parameter.grad = gradient
        self.outer.step()
