"""Each rank steps by itself; the mean of the ranks' changes goes into the global weights one round later (HPSGD)."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_stale import events
from lightning_stale.averaging.merge import Merge
from lightning_stale.averaging.recorded import RecordedReducer, ReplayedReducer
from lightning_stale.averaging.reducer import ProcessGroupReducer
from lightning_stale.averaging.rounds import Interval, Reducer, Rounds
from lightning_stale.coordinator.connection import ServerLostError
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.data.loader import NextBatch
from lightning_stale.data.on_demand import BatchesOnDemand
from lightning_stale.failures import RunFailedError
from lightning_stale.recording.options import Recording, of_rank
from lightning_stale.strategies.checkpoint_entries import AveragingEntry
from lightning_stale.strategies.updates.update import Training, Update, unique_parameters
from lightning_stale.transport.groups import FOREVER, break_off, destroy, new_group
from lightning_stale.transport.wire import WireError

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
        self._batches: BatchesOnDemand | None = None
        self._leases = LeasesOfRounds()
        self.recording = Recording()
        """What is recorded of the training that is about to start, and replayed."""

    @property
    def hands_out_batches(self) -> bool:
        """Whether the training that is about to start asks the coordinator for its batches."""
        return self._batches is not None

    def hand_out_batches(self, trainer: Trainer, workers: int, prefetch: int) -> NextBatch:
        """Ask for batches in the training that is about to start; return what asks for the next.

        Args:
            trainer: of this worker.
            workers: among how many an epoch is shared.
            prefetch: how many batches the loader fetches ahead.
        """
        if self._batches is None:
            resumed = None if self._resumed is None else self._resumed.get("data")
            self._batches = BatchesOnDemand(trainer, workers, self._request_batches, prefetch, resumed)
        return self._batches.next_batch

    def _request_batches(
        self,
        leases: Sequence[int],
        plan: Plan | None,
        kept: Sequence[int] = (),  # as steps: of manual optimization
        steps: int = 0,
    ) -> Grant:
        """Ask for batches; those of ``leases`` are trained, and committed by a later request, or where all meet."""
        assert self._training is not None
        started = time.monotonic()
        averaged = self._leases.note_step(leases)
        grant = self._training.others.request(averaged, plan, kept=leases)
        if self._training_since is not None:
            self._waited_s += time.monotonic() - started
        return grant

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
        reducer = self._recorded(ProcessGroupReducer(self._group, training.device, training.others.check), training)
        self._rounds = Rounds(parameters, reducer, len(ranks), self._interval, self._merge, self._outer, self._record)
        if self._resumed is not None:
            _resume(self._rounds.outer, self._resumed["outer"])
        self._resumed = None
        if self._batches is not None:
            training.others.hand_out(self)
            training.others.meet("the start of fit")  # so that everybody is known by the first request
        self.running = True

    def _recorded(self, reducer: Reducer, training: Training) -> Reducer:
        if self.recording.replay is not None:
            reducer = ReplayedReducer(reducer, of_rank(self.recording.replay, training.rank))
        if self.recording.record is not None:
            reducer = RecordedReducer(reducer, of_rank(self.recording.record, training.rank))
        return reducer

    def before_batch(self) -> None:
        """Let the time from here to the next meeting point count as training."""
        if self._training_since is None:
            self._training_since = time.monotonic()

    def step(self, take: Callable[[], _T]) -> _T:
        """Take the local step, and have done with its batches."""
        self._stepped = True
        result = take()
        if self._batches is not None:
            assert not self._batches.spare, "everybody has a batch before each meeting"
            self._batches.took_step(None)
        return result

    def after_batch(self) -> None:
        """End the round if it is time; not earlier: manual optimization may hold a graph over the weights.

        Where no batch is left before the next meeting, all meet here: it may be one that sees to no round, such as a
        collective that asks whether to save.
        """
        if self._training is None:
            return
        stepped, self._stepped = self._stepped, False
        if self._batches is not None and self._batches.over:  # others may wait for a sum, and no round begins here
            if self._rounds is not None and stepped:
                self._rounds.note_step()
            self.meet("the last batch before a meeting")
        elif self._rounds is not None and stepped and self._training.others.guard(self._rounds.after_step):
            self._leases.begin_round()
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
        if self._batches is not None:
            self._batches.check_meeting()
        others.come_to(place)  # before the flush, which waits for the others without knowing where they are
        others.guard(self._rounds.flush)
        others.wait()

    def check_meeting(self) -> None:
        """Refuse a meeting of workers that are granted batches, for which no round is ended: others may wait for it."""
        if self._batches is not None:
            self._batches.check_meeting(between_steps=False)

    def has_met(self) -> None:
        """All have met, and the coordinator has committed what was trained, and taken back what was not begun."""
        self._leases = LeasesOfRounds()
        if self._batches is not None:
            self._batches.has_met()

    def _record(self, event: events.Event) -> None:
        if isinstance(event, events.Exchanged) and self._training_since is not None:
            self._waited_s += event.wait_s
        assert self._training is not None
        self._training.record(event)

    def state_dict(self) -> AveragingEntry | None:
        return self._ended if self._rounds is None else self._entry(self._rounds)

    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        self._resumed = entry

    def finish(self) -> None:
        """Forget the rounds and the batches; the model holds the global weights."""
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
            self._ended = self._entry(self._rounds)
            self._rounds = None
        if self._batches is not None:
            self._batches.release()
            self._batches = None
        self._leases = LeasesOfRounds()

    def _entry(self, rounds: Rounds) -> AveragingEntry:
        entry: AveragingEntry = {"outer": None if rounds.outer is None else rounds.outer.state_dict()}
        data = self._data()
        return entry if data is None else {**entry, "data": data}

    def _data(self) -> dict[str, Any] | None:
        """Return on rank 0, which saves, of which batches the changes are in the global weights."""
        if self._batches is None or self._training is None or self._training.rank > 0:
            return None
        try:
            return self._batches.state_dict(self._training.others.trained())
        except (ServerLostError, RunFailedError, WireError) as error:
            rank_zero_warn(
                f"which batches of the epoch are trained is lost with the coordinator, who knew: {error}. What is "
                "saved now lacks it: resume from the last checkpoint."
            )
            return None


class LeasesOfRounds:
    """Of the batches that this rank has trained: in which round their changes are.

    Example::

        >>> leases = LeasesOfRounds()
        >>> leases.note_step([4])   # nothing has been averaged by then
        ()
        >>> leases.begin_round()    # its change is on its way
        >>> leases.note_step([6])
        ()
        >>> leases.begin_round()    # and has arrived
        >>> leases.note_step([9])
        (4,)
    """

    def __init__(self) -> None:
        self._mine: tuple[int, ...] = ()  # since the round has begun
        self._under_way: tuple[int, ...] = ()
        self._averaged: tuple[int, ...] = ()

    def note_step(self, leases: Sequence[int]) -> tuple[int, ...]:
        """Note a step with ``leases``; return those that have been averaged since this was called last."""
        averaged, self._averaged = self._averaged, ()
        self._mine = (*self._mine, *leases)
        return averaged

    def begin_round(self) -> None:
        """A round has begun: what was under way has been averaged, and what this rank has done since is under way."""
        self._averaged = (*self._averaged, *self._under_way)
        self._under_way, self._mine = self._mine, ()


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
