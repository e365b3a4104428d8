"""One worker's batches: granted by the coordinator, in an epoch whose progress is that of all workers."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_stale.coordinator.leases import Grant, Plan, merged
from lightning_stale.data.loader import too_few
from lightning_stale.private.of_loops import (
    EpochCounters,
    check_epoch,
    keep_bar_up,
    keep_schedulers_up,
    note_saved,
    resume_in_silence,
    validates_amid_step,
)


class Request(Protocol):
    """Asks the coordinator for batches, and waits for them."""

    def __call__(self, leases: Sequence[int], plan: Plan | None, kept: Sequence[int] = (), steps: int = 0) -> Grant:
        """Return what may be computed next.

        Args:
            leases: of those that count as trained, and that no push has committed.
            plan: if it is the first request since the last meeting.
            kept: leases of those whose gradients a later push will have.
            steps: how often optimizers have stepped in the batch that is over, in manual optimization.
        """


def why_rather_not(trainer: Trainer, loader: DataLoader[Any], workers: int) -> str | None:
    """Return why nobody would want batches of ``loader`` handed out who has not asked for it, or ``None``.

    It would be an error, or mean something else than with shards.
    """
    if not trainer.lightning_module.automatic_optimization and trainer.lr_scheduler_configs:
        return "optimization is manual, and a scheduler that training_step steps counts the batches of its own worker"
    batches = len(loader.batch_sampler)  # type: ignore[arg-type]
    return too_few(loader, workers) or validates_amid_step(trainer, batches // workers)


class BatchesOnDemand:
    """Asks for batches, says which leases a push carries, and lets Lightning count what all workers have done.

    Progress is counted in steps of each of equal workers: ``s`` steps are over when the workers have taken ``s`` times
    as many as there are of them. Lightning's counters (of batches, steps and what was logged), its schedulers and its
    decisions follow it, so that they agree on all workers where they meet, and are what shards give where workers are
    equal.

    In manual optimization a batch may be in several pushes, and a push may have several batches. A batch in which an
    optimizer has stepped is trained when it is over, with those before it whose gradients had been kept.

    Args:
        trainer: of this worker.
        workers: how many there are.
        request: asks the coordinator.
        prefetch: how many batches the loader fetches ahead.
        resumed: what :meth:`state_dict` returned when the checkpoint was saved that this fit goes on from.
        joined: what :meth:`segment` returned on rank 0, of one that joins a fit that runs.
        before_segment: called before the first request after each meeting.
    """

    def __init__(
        self,
        trainer: Trainer,
        workers: int,
        request: Request,
        prefetch: int = 0,
        resumed: Mapping[str, Any] | None = None,
        joined: Mapping[str, Any] | None = None,
        before_segment: Callable[[], None] = lambda: None,
    ) -> None:
        self._trainer, self._workers, self._request, self._prefetch = trainer, workers, request, prefetch
        self._resumed, self._joined, self._before_segment = resumed, joined, before_segment
        self._epoch = -1
        self._order = 0  # a checksum
        self._batches = 0  # of the epoch, of all workers
        self._rest: list[int] = []  # of them, as this fit began with the epoch
        self._grant: Grant | None = None  # None: ask, with a plan
        self._start = self._step = self._steps = 0  # of the epoch: where this fit begins; now; and from there on
        self._next = 0  # among the rest
        self._had_one = False  # in this epoch
        self.spare = False
        """Whether the batch that is computed is trained by somebody else: nothing is to become of its gradient."""
        self._scheduled = dict.fromkeys((False, True), 0)
        self.manual = not trainer.lightning_module.automatic_optimization
        """Whether ``training_step`` steps the optimizers itself."""
        self._kept: tuple[int, ...] = ()  # leases whose gradients are in no push yet
        self._has_stepped = False  # in this batch
        self._most = 0  # steps of optimizers in one
        self._undo = [
            keep_schedulers_up(trainer, self._unscheduled),
            resume_in_silence(trainer),
            keep_bar_up(trainer),
        ]

    # --- batches ----------------------------------------------------------------------------------------------------

    def next_batch(self, order: Sequence[Sequence[int]]) -> list[int]:
        """Return which batch of the epoch is to be computed now, and then those that are likely to be next.

        It waits until one is granted. None is returned where none is left before the next meeting, for a worker that
        has come late, or where there are more workers than leases: it goes on to the meeting. If it has had none in
        this epoch, it gets one whose gradient is :attr:`spare`: what it logs of it, it needs where all workers reduce.

        Args:
            order: the samples of all batches of the epoch.
        """
        if self._grant is None or self._grant.over:  # it has counted up to here, and there was nothing to meet for
            if self._trainer.current_epoch != self._epoch:
                self._begin_epoch(order)
            self._before_segment()
            self._hold(self._request((), self._plan()))
        grant = self._grant
        assert grant is not None
        if grant.over:
            last = self._step == self._start + self._steps
            if self._had_one:
                self._counters.without_batch(self._done, self._step, grant.taken, last)
                return []
            self._had_one = self.spare = True
            self._counters.before_batch(self._done - 1, last)
            return [self._rest[0]]
        self._had_one = True
        number, self._next = self._next, self._next + 1
        # a lease of the last step may be short, and ends there whatever the others do; all others end before it
        ends = number >= (self._steps - 1) * self._each * self._workers
        step = min(self._step, self._start + self._steps - (1 if ends else 2))
        last = ends and self._next == grant.last
        self._counters.before_batch(step * self._each + number - grant.first, last)
        return [self._rest[one] for one in (*range(number, grant.last), *grant.ahead)]

    @property
    def leases(self) -> tuple[int, ...]:
        """Those whose gradients the next push will have."""
        return () if self._grant is None or self._grant.over else (*self._kept, self._grant.lease)

    @property
    def amid_step(self) -> bool:
        """Whether a batch has been begun whose gradient is no update yet."""
        return self._grant is not None and self._next > self._grant.first

    def took_step(self, grant: Grant | None) -> None:
        """This worker's optimizer has stepped, or was to: go on with ``grant``; without one, ask for it."""
        if self.spare:
            self.spare, grant = False, self._grant
        elif grant is None:
            grant = self._request(self.leases, None)
        assert grant is not None
        self._hold(grant)
        over = grant.over and self._step == self._start + self._steps
        self._counters.in_step(self._done, self._step, meets=grant.over, last=over)

    def note_step(self) -> None:
        """An optimizer steps amid a batch, in manual optimization."""
        self._has_stepped = True

    def end_batch(self) -> None:
        """A batch is over, in manual optimization: go on with what is granted next."""
        if not self.amid_step:
            return
        mine, trained = self.leases, self._has_stepped
        grant = self._request(
            mine if trained else (), None, kept=() if trained else mine, steps=self._counters.steps_by_hand
        )
        self._kept, self._has_stepped = () if trained or grant.over else mine, False
        self._hold(grant)
        over = grant.over and self._step == self._start + self._steps
        self._counters.after_batch(self._done, grant.taken, meets=grant.over, last=over)

    @property
    def over(self) -> bool:
        """Whether none is left before the next meeting, which has not been yet."""
        return self._grant is not None and self._grant.over

    def check_meeting(self, between_steps: bool = True) -> None:
        """Refuse a meeting amid a step.

        Args:
            between_steps: whether they may meet between two.

        Raises:
            MisconfigurationException: with what to write instead.
        """
        if self.amid_step or (not between_steps and self._grant is not None):
            nor = "" if between_steps else ", nor between two"
            raise MisconfigurationException(
                f"workers that are granted batches do not meet amid a step{nor}: some compute more of them than "
                "others. Log with sync_dist=False or on_step=False, use no collective operation in training_step, or "
                f"give each worker its shard: {type(self._trainer.strategy).__name__}(data='shards'), which is not "
                "elastic"
            )

    def has_met(self) -> None:
        """All have met, and what this worker had not begun was taken back: ask anew."""
        self._grant, self._kept = None, ()

    @property
    def _done(self) -> int:
        """How many batches of each worker are over, with the step that has begun."""
        return min(self._step * self._each, int(self._trainer.num_training_batches))

    def _hold(self, grant: Grant) -> None:
        self._grant, self._next = grant, grant.first
        self._step, self._most = self._start + grant.step, grant.most

    def _begin_epoch(self, order: Sequence[Sequence[int]]) -> None:
        trainer = self._trainer
        check_epoch(trainer)
        self._had_one = False
        self._epoch, self._each = trainer.current_epoch, trainer.accumulate_grad_batches
        length = int(trainer.num_training_batches)
        self._batches = len(order) if length == len(order) // self._workers else length * self._workers
        self._order = zlib.crc32(array("q", chain.from_iterable(order)).tobytes(), len(order))
        joined, self._joined = self._joined, None
        done = self._done_before(self._resumed) if joined is None else self._done_at_join(joined)
        self._resumed = None
        self._rest = [number for number in range(self._batches) if number not in done]
        self._steps = -(-(len(self._rest) // self._workers) // self._each)
        self._start = -(-length // self._each) - self._steps
        self._step = self._start if joined is None else joined["step"]
        self._counters = EpochCounters(trainer, self._step)
        self._scheduled = dict.fromkeys((False, True), self._step)

    def _done_at_join(self, joined: Mapping[str, Any]) -> set[int]:
        if joined["order"] != self._order:
            raise MisconfigurationException(
                f"this process joins a fit in epoch {joined['epoch']}, and the order of its batches is another one "
                "here: have the same data, batch_size and seed (seed_everything) as its rank 0"
            )
        return _numbers(joined["committed"])

    def _done_before(self, resumed: Mapping[str, Any] | None) -> set[int]:
        if resumed is None or resumed["epoch"] != self._epoch:
            return set()
        if resumed["order"] != self._order:
            raise MisconfigurationException(
                f"the checkpoint was saved amid epoch {self._epoch}, and the order of its batches is another one now: "
                "have the same seed (seed_everything), data and batch_size, or go on from a checkpoint that was saved "
                "at the end of an epoch"
            )
        note_saved(self._trainer)
        return _numbers(resumed["committed"])

    def _plan(self) -> Plan:
        until = self._counters.next_meeting(self._step, self._start + self._steps, self._most)
        ahead = -(-self._prefetch // self._each)
        return Plan(self._epoch, len(self._rest), self._each, self._steps, until - self._start, ahead)

    def _unscheduled(self, plateau: bool) -> range:
        steps = range(self._scheduled[plateau] + 1, self._step + 1)
        self._scheduled[plateau] = self._step
        return steps

    # --- checkpoints, and the end -----------------------------------------------------------------------------------

    def state_dict(self, leases: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return which batches of the epoch are trained, as plain numbers and lists; ``None`` before the first.

        Args:
            leases: ``EpochLeases.state_dict()``.
        """
        if leases["plan"] is None or leases["plan"]["epoch"] != self._epoch:
            return None
        return self._where({self._rest[number] for number in _numbers(leases["committed"])})

    def segment(self) -> dict[str, Any]:
        """Return where all are as they ask anew after a meeting, for one who comes to them: plain numbers and lists."""
        return {**self._where(set()), "step": self._step}

    def _where(self, trained: set[int]) -> dict[str, Any]:
        """Return which batches are trained: those before this fit began with the epoch, and ``trained``."""
        left = set(self._rest) - trained
        done = (number for number in range(self._batches) if number not in left)
        return {
            "epoch": self._epoch,
            "order": self._order,
            "committed": merged((number, number + 1) for number in done),
        }

    def release(self) -> None:
        """Give Lightning its schedulers, its warnings and its progress bar back."""
        while self._undo:
            self._undo.pop()()


def _numbers(ranges: Sequence[Sequence[int]]) -> set[int]:
    return {number for first, last in ranges for number in range(first, last)}
