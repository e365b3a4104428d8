"""Each rank steps by itself; the mean of the ranks' changes goes into the global weights one round later (HPSGD)."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_stale import events
from lightning_stale.averaging.merge import Merge
from lightning_stale.averaging.reducer import ProcessGroupReducer
from lightning_stale.averaging.rounds import Interval, Rounds
from lightning_stale.strategies.checkpoint_entries import AveragingEntry
from lightning_stale.strategies.updates.update import Training, Update, unique_parameters
from lightning_stale.transport.groups import FOREVER, break_off, destroy, new_group

OuterOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]
_T = TypeVar("_T")


class AveragingUpdate(Update):
    """:class:`~lightning_stale.averaging.rounds.Rounds`, as an update.

    Args:
        interval: of the rounds.
        merge: what the replica becomes.
        outer: makes the optimizer of the global weights; ``None``: plain subtraction.
    """

    def __init__(self, interval: Interval, merge: Merge, outer: OuterOptimizer | None) -> None:
        self._interval, self._merge, self._outer = interval, merge, outer
        self._training: Training | None = None
        self._rounds: Rounds | None = None
        self._group: dist.ProcessGroup | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._ended: AveragingEntry | None = None  # when training had ended, or failed
        self._training_since: float | None = None
        self._waited_s = 0.0  # since then, for the end of a round
        self._stepped = False  # in this batch
        self._held = 0  # parameters, when training started

    def start(self, training: Training) -> None:
        """Begin the first round.

        Raises:
            MisconfigurationException: if there is no optimizer.
        """
        parameters = unique_parameters(training.optimizers)
        if not parameters:
            raise MisconfigurationException(
                "configure_optimizers() returned no optimizer, and HPSGD averages what optimizers change: return one, "
                "or write Trainer(strategy='ddp')"
            )
        self._training, self._held = training, len(parameters)
        self._training_since, self._waited_s, self._stepped = None, 0.0, False
        ranks = training.topology.ranks_of_stage(training.topology.position(training.rank).stage)
        self._group = new_group(ranks, training.timeout)
        self._group.set_timeout(FOREVER)  # a sum waits for the slowest worker, and whether it lives is known otherwise
        atexit.register(self._break_off)
        reducer = ProcessGroupReducer(self._group, training.device, training.others.check)
        self._rounds = Rounds(parameters, reducer, len(ranks), self._interval, self._merge, self._outer, self._record)
        if self._resumed is not None:
            _resume(self._rounds.outer, self._resumed["outer"])
        self._resumed = None
        self.running = True

    def before_batch(self) -> None:
        """Let the time from here to the next meeting point count as training."""
        if self._training_since is None:
            self._training_since = time.monotonic()

    def step(self, take: Callable[[], _T]) -> _T:
        """Take the local step."""
        self._stepped = True
        return take()

    def after_batch(self) -> None:
        """End the round if it is time; not earlier: manual optimization may hold a graph over the weights."""
        if self._training is None:
            return
        if self._rounds is not None and self._stepped:
            self._training.others.guard(self._rounds.after_step)
        self._stepped = False
        self._training.others.check()

    def meet(self, place: str) -> None:
        """Flush the rounds."""
        if self._training is None or self._rounds is None:
            return
        if self._training_since is not None:
            now = time.monotonic()
            computed_s = now - self._training_since - self._waited_s
            self._training_since, self._waited_s = None, 0.0
            self._record(events.Spent(now, self._training.rank, wait_s=0.0, compute_s=computed_s))
        optimizers, others = self._training.optimizers, self._training.others
        held = len(unique_parameters(optimizers))
        if held != self._held:
            raise MisconfigurationException(
                f"{', '.join(type(optimizer).__name__ for optimizer in optimizers)} had {self._held} parameters "
                f"when fit started and has {held} now, which would not be averaged: give it all parameters "
                "in configure_optimizers and freeze them with requires_grad=False until they are to learn"
            )
        others.come_to(place)  # before the flush, which waits for the others without knowing where they are
        others.guard(self._rounds.flush)
        others.wait()

    def _record(self, event: events.Event) -> None:
        if isinstance(event, events.Exchanged) and self._training_since is not None:
            self._waited_s += event.wait_s
        assert self._training is not None
        self._training.record(event)

    def state_dict(self) -> AveragingEntry | None:
        return self._ended if self._rounds is None else _entry(self._rounds)

    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        self._resumed = entry

    def finish(self) -> None:
        """Forget the rounds; the model holds the global weights."""
        self._end_rounds()
        self._end_group()

    def release(self) -> None:
        self._end_rounds()
        self._break_off()
        self._training = None

    def _break_off(self) -> None:
        """Do not wait for a sum in flight: a worker that has ended may never have begun it."""
        if self._group is not None:
            break_off(self._group)
            self._end_group()

    def _end_group(self) -> None:
        atexit.unregister(self._break_off)
        group, self._group = self._group, None
        if group is not None:
            destroy(group)

    def _end_rounds(self) -> None:
        self.running = False
        if self._rounds is not None:
            self._ended = _entry(self._rounds)
            self._rounds = None


def _entry(rounds: Rounds) -> AveragingEntry:
    return {"outer": None if rounds.outer is None else rounds.outer.state_dict()}


def _resume(outer: Optimizer | None, state: dict[str, Any] | None) -> None:
    if outer is not None and state is not None:
        outer.load_state_dict(state)
    elif outer is not None:
        rank_zero_warn("the checkpoint has no state of an outer optimizer: this one starts anew")
    elif state is not None:
        rank_zero_warn(
            "the checkpoint has the state of an outer optimizer, and there is none now: it is left out. To go on "
            "with it, write HPSGDStrategy(outer_optimizer=...) as before"
        )
