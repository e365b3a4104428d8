"""Where Lightning's loop is in its epoch, read and set (read in 2.6.6); a test fails when one of them moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_stale.private.of_lightning import callbacks, replace

_NO_BATCH = "train_dataloader yielded None. If this was on purpose, ignore this warning..."
_COUNTS = ("ready", "started", "processed", "completed")


class EpochCounters:
    """Lightning's counters of the epoch that a loop is in, which count this worker's batches and steps by themselves.

    They are set to say how far all workers are. Its loop goes on from there: it counts the batch that it is at.

    Args:
        trainer: whose loop.
        step: in steps of the optimizer, where the loop is: it has not begun the epoch, or resumes amid it.
    """

    def __init__(self, trainer: Trainer, step: int) -> None:
        self._trainer, self._loop = trainer, trainer.fit_loop.epoch_loop
        self._stepped = self._loop.automatic_optimization.optim_progress.optimizer.step
        self._set_batches(step * trainer.accumulate_grad_batches, totals_too=False)
        self._stepped.current.ready = self._stepped.current.completed = step
        self._logged = self._loop._batches_that_stepped - step  # at the start of the epoch

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
        progress.is_last_batch = self._fetcher.done = last
        ahead = step - 1 - self._stepped.current.completed
        for tracker in (self._stepped.current, self._stepped.total):
            tracker.completed += ahead
            tracker.ready = tracker.completed + 1
        self._loop._batches_that_stepped = self._logged + step - 1
        self._loop._skip_next_val = not meets

    def without_batch(self, batches: int, step: int, last: bool) -> None:
        """Say how far all are where they meet next, and this worker has no batch until then: it gets ``None``.

        Lightning runs no step for that, and goes on as after one. Call it while it fetches.

        Args:
            batches: of each worker.
            step: the same in steps.
            last: whether the epoch is over with it.
        """
        self.before_batch(batches - 1, last)
        progress = self._loop.batch_progress
        progress.increment_started()  # the loop counts this one as ready, processed and completed
        ahead = step - self._stepped.current.completed
        for tracker in (self._stepped.current, self._stepped.total):
            tracker.completed += ahead
            tracker.ready = tracker.completed
        self._loop._batches_that_stepped = self._logged + step - 1
        self._loop._skip_next_val = False
        self._loop._warning_cache.add(_NO_BATCH)

    def _set_batches(self, batches: int, totals_too: bool = True) -> None:
        progress = self._loop.batch_progress
        for name in _COUNTS:
            ahead = batches - getattr(progress.current, name)
            for tracker in (progress.current, progress.total) if totals_too else (progress.current,):
                setattr(tracker, name, getattr(tracker, name) + ahead)

    # --- where all meet -------------------------------------------------------------------------------------------

    def next_meeting(self, step: int, steps: int) -> int:
        """Return after which step of the epoch all meet next: to validate, to save, or as it is over.

        Args:
            step: where they are.
            steps: that the epoch has.
        """
        trainer, each = self._trainer, self._trainer.accumulate_grad_batches
        done = self._stepped.total.completed - self._stepped.current.completed  # before the epoch
        ends = [steps]
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps - done)
        for callback in callbacks(trainer):
            every = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
            if every >= 1:
                ends.append(_next_multiple(done + step, every) - done)
        check = trainer.val_check_batch
        if self._loop._should_check_val_epoch() and check is not None and check != math.inf:
            before = self._loop.batch_progress.total.ready - self._loop.batch_progress.current.ready
            before = before if trainer.check_val_every_n_epoch is None else 0
            ends.append(-(-(_next_multiple(before + step * each, int(check)) - before) // each))
        return min(end for end in ends if end > step)


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
            "StaleSyncStrategy(data='shards'), or one loader over a dataset that has the samples of all"
        )
    if trainer.enable_validation and check not in (None, math.inf, length) and int(check) % each:
        raise MisconfigurationException(
            f"val_check_interval={trainer.val_check_interval}, which is {int(check)} batches, ends amid a step of "
            f"accumulate_grad_batches={each}: write a multiple of {each}, or StaleSyncStrategy(data='shards')"
        )


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
