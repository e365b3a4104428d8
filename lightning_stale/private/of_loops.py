"""Where Lightning's loop is in its epoch, read and set (read in 2.6.6); a test fails when one of them moves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_stale.private.of_lightning import callbacks, replace, saves_now

_NO_BATCH = "train_dataloader yielded None. If this was on purpose, ignore this warning..."
_COUNTS = ("ready", "started", "processed", "completed")


class EpochCounters:
    """Lightning's counters of the epoch that a loop is in, which count this worker's batches and steps by themselves.

    They are set to say how far all workers are. Its loop goes on from there: it counts the batch that it is at.

    In manual optimization Lightning counts every step of every optimizer as one, and nobody knows before how many a
    batch takes. Below, a step is then a batch.

    Args:
        trainer: whose loop.
        step: in steps of the optimizer, where the loop is: it has not begun the epoch, or resumes amid it.
    """

    def __init__(self, trainer: Trainer, step: int) -> None:
        self._trainer, self._loop = trainer, trainer.fit_loop.epoch_loop
        self._stepped = self._loop.automatic_optimization.optim_progress.optimizer.step
        self._set_batches(step * trainer.accumulate_grad_batches, totals_too=False)
        self._mend(trainer.fit_loop.epoch_progress)
        self._stepped.current.ready = self._stepped.current.completed = step
        self._by_hand = self._loop.manual_optimization.optim_step_progress
        self._before = self._told = self._by_hand.total.completed  # at the start of the epoch; and told last
        self._limit: float = math.inf  # they are not so many before the next meeting
        self._logged = self._loop._batches_that_stepped - step  # at the start of the epoch

    def _mend(self, epochs: Any) -> None:
        """Have all counts as in an epoch that has begun.

        Where Lightning resumes from what was saved in the last batch of an epoch, it takes the next epoch for one that
        had begun. Its counts do not fit together from then on, and by these it finds out, when what is saved now is
        gone on from, where that was: it would take the end of an epoch for amid it, and train what has been trained.
        """
        batches = self._loop.batch_progress.total
        for name in _COUNTS:
            setattr(batches, name, batches.ready)
        for tracker in (epochs.current, epochs.total):
            tracker.ready = tracker.started = tracker.processed + 1

    @property
    def _fetcher(self) -> Any:
        return self._trainer.fit_loop._data_fetcher

    def before_batch(self, batches: int, last: bool) -> None:
        """Say that ``batches`` of the epoch are over; call it while the next one is fetched.

        Args:
            batches: of each worker.
            last: whether the step after that next batch is this worker's last of the epoch, as far as it is known.
        """
        self._set_batches(batches)
        length = int(self._trainer.num_training_batches)
        self._fetcher.fetched = length - 1 if last else min(batches, length - 2)

    def in_step(self, batches: int, step: int, meets: bool, last: bool) -> None:
        """Say how far all are after the step that the loop is taking.

        Args:
            batches: of each worker, this one's of now included.
            step: the same in steps.
            meets: whether all meet after it.
            last: whether it is this worker's last of the epoch.
        """
        self._set_batches(batches - 1)
        progress = self._loop.batch_progress
        progress.increment_ready()  # the loop has counted these two already
        progress.increment_started()
        self._set_end(step, meets, last)
        self._set_steps(step - 1, begun=1)

    def _set_steps(self, completed: int, begun: int) -> None:
        ahead = completed - self._stepped.current.completed
        for tracker in (self._stepped.current, self._stepped.total):
            tracker.completed += ahead
            tracker.ready = tracker.completed + begun

    def _set_end(self, step: int, meets: bool, last: bool) -> None:
        self._loop.batch_progress.is_last_batch = self._fetcher.done = last
        self._loop._batches_that_stepped = self._logged + step - 1
        self._loop._skip_next_val = not meets

    def without_batch(self, batches: int, step: int, taken: int, last: bool) -> None:
        """Say how far all are where they meet next, and this worker has no batch until then: it gets ``None``.

        Lightning runs no step for that, and goes on as after one. Call it while it fetches.

        Args:
            batches: of each worker.
            step: the same in steps.
            taken: how often optimizers have stepped in these, in manual optimization.
            last: whether the epoch is over with it.
        """
        self.before_batch(batches - 1, last)
        progress = self._loop.batch_progress
        progress.increment_started()  # the loop counts this one as ready, processed and completed
        self._set_steps(step, begun=0)
        self._set_by_hand(taken)
        self._loop._batches_that_stepped = self._logged + step - 1
        self._loop._skip_next_val = False
        self._loop._warning_cache.add(_NO_BATCH)

    @property
    def steps_by_hand(self) -> int:
        """How often optimizers have stepped since the last batch, in manual optimization."""
        return int(self._by_hand.total.completed - self._told)

    def after_batch(self, batch: int, taken: int, meets: bool, last: bool) -> None:
        """Say how far all are after the batch that the loop is at the end of, in manual optimization.

        Args:
            batch: of each worker, this one's of now included.
            taken: how often optimizers have stepped in these.
            meets: whether all meet after it.
            last: whether it is this worker's last of the epoch.
        """
        self._set_batches(batch - 1)
        progress = self._loop.batch_progress
        progress.increment_ready()  # the loop has counted these three already
        progress.increment_started()
        progress.increment_processed()
        self._set_end(batch, meets, last)
        self._set_by_hand(taken if meets else min(taken, self._limit - 1 - self._before))

    def _set_by_hand(self, taken: float) -> None:
        self._told = self._before + int(taken)
        for tracker in (self._by_hand.current, self._by_hand.total):
            tracker.ready = tracker.completed = self._told

    def _set_batches(self, batches: int, totals_too: bool = True) -> None:
        progress = self._loop.batch_progress
        for name in _COUNTS:
            ahead = batches - getattr(progress.current, name)
            for tracker in (progress.current, progress.total) if totals_too else (progress.current,):
                setattr(tracker, name, getattr(tracker, name) + ahead)

    # --- where all meet -------------------------------------------------------------------------------------------

    def next_meeting(self, step: int, steps: int, most: int) -> int:
        """Return after which step of the epoch all meet next: to validate, to save, or as it is over.

        In manual optimization, it may be before that: then it is asked again.

        Args:
            step: where they are.
            steps: that the epoch has.
            most: how often optimizers have stepped in one batch, in manual optimization; 0 before the first.
        """
        trainer, each = self._trainer, self._trainer.accumulate_grad_batches
        if trainer.lightning_module.automatic_optimization:
            done = self._stepped.total.completed - self._stepped.current.completed  # before the epoch
            ends = [steps, *(goal - done for goal in self._goals(done + step))]
        else:
            goals = self._goals(self._told)
            self._limit = min(goals, default=math.inf)
            per_batch = max(most, len(trainer.optimizers)) if most else self._limit  # not known: ask after one batch
            ends = [steps, *(step + math.ceil((goal - self._told) / per_batch) for goal in goals if goal > self._told)]
        check = trainer.val_check_batch
        if self._loop._should_check_val_epoch() and check is not None and check != math.inf:
            before = self._loop.batch_progress.total.ready - self._loop.batch_progress.current.ready
            before = before if trainer.check_val_every_n_epoch is None else 0
            ends.append(-(-(_next_multiple(before + step * each, int(check)) - before) // each))
        return min(end for end in ends if end > step)

    def _goals(self, now: int) -> list[int]:
        """Return at which numbers of steps something is to be done next, ``now`` being how many there were."""
        goals = [self._trainer.max_steps] if self._trainer.max_steps >= 0 else []
        for callback in callbacks(self._trainer):
            every = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
            if every >= 1:
                goals.append(_next_multiple(now, every))
        return goals


def _next_multiple(number: int, of: int) -> int:
    return (number // of + 1) * of


def check_epoch(trainer: Trainer) -> None:
    """Refuse an epoch in which workers that are granted batches could not meet.

    Raises:
        MisconfigurationException: with what to write instead.
    """
    loader, each = trainer.fit_loop._combined_loader, trainer.accumulate_grad_batches
    check, length = trainer.val_check_batch, trainer.num_training_batches
    if loader is not None and len(loader.flattened) > 1:
        raise MisconfigurationException(
            f"batches of {len(loader.flattened)} training loaders cannot be handed out: write "
            f"{type(trainer.strategy).__name__}(data='shards'), which is not elastic, or one loader over a dataset "
            "that has the samples of all"
        )
    if trainer.enable_validation and check not in (None, math.inf, length) and int(check) % each:
        raise MisconfigurationException(
            f"{_ends_amid_step(trainer, int(check))}: write a multiple of {each}, or "
            f"{type(trainer.strategy).__name__}(data='shards'), which is not elastic"
        )


def _ends_amid_step(trainer: Trainer, check: int) -> str:
    return (
        f"val_check_interval={trainer.val_check_interval}, which is {check} batches, ends amid a step of "
        f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
    )


def validates_amid_step(trainer: Trainer, length: int) -> str | None:
    """Return what is wrong if workers would have to meet amid a step to validate, before the loop has its data.

    Args:
        trainer: whose loop.
        length: of the training data, in batches of each worker.
    """
    each, interval, limit = trainer.accumulate_grad_batches, trainer.val_check_interval, trainer.limit_train_batches
    if each == 1 or trainer.limit_val_batches == 0 or interval in (None, 1.0):
        return None
    length = min(length, limit) if isinstance(limit, int) else int(length * (limit or 1.0))
    check = interval if isinstance(interval, int) else max(1, int(length * interval))
    return _ends_amid_step(trainer, check) if check % each and check != length else None


def keep_bar_up(trainer: Trainer) -> Callable[[], None]:
    """Let the progress bar be at the batch of all workers after each, and not where it began; return what undoes it."""
    bar, loop = trainer.progress_bar_callback, trainer.fit_loop.epoch_loop
    if bar is None:
        return lambda: None
    update = bar.on_train_batch_end

    def on_train_batch_end(trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG001
        update(trainer, module, outputs, batch, loop.batch_idx)

    return replace(bar, "on_train_batch_end", on_train_batch_end)


def keep_schedulers_up(trainer: Trainer, unseen: Callable[[bool], range]) -> Callable[[], None]:
    """Step the schedulers that step with the optimizer as often as there were steps; return what undoes it.

    Args:
        trainer: whose schedulers.
        unseen: returns the numbers of the steps of the epoch that they have not seen, counted from one; called once for
            those that look at a metric (``True``), and once for the others.
    """
    loop = trainer.fit_loop.epoch_loop
    update = loop.update_lr_schedulers

    def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
        if interval != "step" or loop._should_accumulate():
            update(interval, update_plateau_schedulers)
            return
        current = loop.batch_progress.current
        ready = current.ready
        try:
            for step in unseen(update_plateau_schedulers):
                current.ready = min(step * trainer.accumulate_grad_batches, int(trainer.num_training_batches))
                update(interval, update_plateau_schedulers)
        finally:
            current.ready = ready

    return replace(loop, "update_lr_schedulers", update_lr_schedulers)


def resume_in_silence(trainer: Trainer) -> Callable[[], None]:
    """Let Lightning not warn, as it resumes amid an epoch, that its loader cannot be resumed; return what undoes it.

    It looks for a ``state_dict`` of the loader, which batches that are handed out have no need of.
    """
    loop = trainer.fit_loop.epoch_loop
    reset = loop.reset

    def reset_in_silence() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            reset()

    return replace(loop, "reset", reset_in_silence)


def note_saved(trainer: Trainer) -> None:
    """Say that what is saved at the step of now has been: it would be again amid the next one (accumulation)."""
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and saves_now(callback, trainer):
            callback._last_global_step_saved = trainer.global_step
