"""Change the thresholds of SSP, DSSP and bounded delay while training runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_stale.strategies.stale_sync import StaleSyncStrategy

Mode = Literal["min", "max"]


class ThresholdSchedule(Callback):
    """Change thresholds at given epochs, or lower them when a metric has stopped improving.

    By epoch: ``milestones`` says which thresholds hold from the start of which epoch on.

    By metric: staleness is lowered as training converges, as learning rates are. After each validation (at the end of
    each epoch where there is none), the metric is compared with its best value so far; once ``patience`` comparisons
    in a row have shown no improvement, all thresholds are multiplied by ``factor`` and rounded down, but not below
    ``minimum``. NaN is no improvement. Rank 0's metric decides, so it needs no ``sync_dist``.

    All workers meet where thresholds change, so that none goes on under the old ones. The state is in the checkpoint:
    a run that resumes goes on with the thresholds of the checkpoint, the best value and the count.

    Args:
        milestones: epoch, from 0 -> thresholds from its start on, under the names that the paradigm has for them:
            ``{5: {"threshold": 8}}`` for SSP, ``{5: {"lower": 1, "upper": 6}}`` or a part of it for DSSP,
            ``{5: {"delay": 8}}`` for bounded delay, which adapts until then if it does.
        monitor: the name of a logged metric, e.g. ``"val_loss"``; instead of ``milestones``.
        mode: whether the metric is to fall (``"min"``) or to rise (``"max"``).
        patience: after how many comparisons without improvement thresholds change.
        factor: what they are multiplied by, between 0 and 1.
        minimum: the value below which no threshold is lowered: clocks, or leases where it is a delay.

    Raises:
        ValueError: for an impossible value, and if there are both milestones and what belongs to a metric, or neither.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import ThresholdSchedule
        >>> by_epoch = ThresholdSchedule(milestones={5: {"threshold": 8}, 10: {"threshold": 3}})
        >>> by_metric = ThresholdSchedule(monitor="val_loss", patience=2, factor=0.5)
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="ssp", callbacks=[by_metric],
        ...                   logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        milestones: Mapping[int, Mapping[str, int]] | None = None,
        monitor: str | None = None,
        mode: Mode = "min",
        patience: int = 3,
        factor: float = 0.5,
        minimum: int = 1,
    ) -> None:
        if (milestones is None) == (monitor is None):
            raise ValueError(
                f"milestones={milestones!r}, monitor={monitor!r}: write one of them, "
                "milestones={5: {'threshold': 8}} or monitor='val_loss'"
            )
        if milestones is not None and (mode, patience, factor, minimum) != ("min", 3, 0.5, 1):
            raise ValueError(
                f"mode={mode!r}, patience={patience!r}, factor={factor!r}, minimum={minimum!r} belong to monitor=...: "
                "leave them out, or write monitor='val_loss' instead of milestones"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: write 'min' for a metric that is to fall, or 'max'")
        if not _is_count(patience) or patience < 1:
            raise ValueError(f"patience={patience!r}: write after how many checks thresholds change, >= 1")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 1:
            raise ValueError(f"factor={factor!r}: write what thresholds are multiplied by, between 0 and 1, e.g. 0.5")
        if not _is_count(minimum):
            raise ValueError(f"minimum={minimum!r}: write the value below which no threshold is lowered, >= 0")
        self.milestones = _check_milestones(milestones)
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.factor = factor
        self.minimum = minimum
        self._last_milestone = -1
        self._best = math.inf if mode == "min" else -math.inf
        self._bad_checks = 0
        self._thresholds: dict[str, int] = {}  # those in force; none where they adapt
        self._resumed: dict[str, int] | None = None  # those of the checkpoint, until training starts

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are thresholds, and that the milestones fit them."""
        strategy = trainer.strategy
        if not isinstance(strategy, StaleSyncStrategy) or not strategy.paradigm.thresholds:
            found = (
                f"paradigm={strategy.paradigm!r}"
                if isinstance(strategy, StaleSyncStrategy)
                else type(strategy).__name__
            )
            raise MisconfigurationException(
                f"ThresholdSchedule changes thresholds, and {found} has none: write Trainer(strategy='ssp'), "
                "'dssp' or 'bounded-delay', or leave the schedule out"
            )
        paradigm = copy.deepcopy(strategy.paradigm)
        ahead = {epoch: self.milestones[epoch] for epoch in self.milestones if epoch > self._last_milestone}
        for epoch, thresholds in ahead.items():
            try:
                paradigm.set_thresholds(0.0, **thresholds)
            except ValueError as error:
                raise MisconfigurationException(f"milestones={{{epoch}: {thresholds}}}: {error}") from error
        try:
            paradigm.set_thresholds(0.0, **dict.fromkeys(paradigm.thresholds, self.minimum))
        except ValueError as error:
            raise MisconfigurationException(f"minimum={self.minimum}: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the thresholds of the checkpoint; the server has not started yet, and does so with them."""
        strategy = _strategy(trainer)
        if self._resumed is not None and self._resumed.keys() == strategy.paradigm.thresholds.keys():
            strategy.set_thresholds(**self._resumed)
        elif self._resumed:
            self._last_milestone = -1
            rank_zero_warn(
                f"the checkpoint's thresholds {self._resumed} are those of another paradigm: training goes on with "
                f"{strategy.paradigm!r} and the milestones that are past"
            )
        self._resumed = None
        self._pass_milestones(trainer)
        self._thresholds = _lasting(strategy)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass a milestone."""
        if self._pass_milestones(trainer):
            trainer.strategy.barrier("a change of thresholds")  # by now the server has rank 0's
            self._thresholds = _lasting(_strategy(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check_metric(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric, where there is no validation."""
        if not trainer.enable_validation:
            self._check_metric(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the thresholds in force (but none that adapt), the last milestone, the best value and the count."""
        return {
            "thresholds": self._thresholds if self._resumed is None else self._resumed,
            "last_milestone": self._last_milestone,
            "best": self._best,
            "bad_checks": self._bad_checks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint; its thresholds come into force when training starts."""
        self._resumed = dict(state_dict["thresholds"])
        self._last_milestone = state_dict["last_milestone"]
        self._best, self._bad_checks = state_dict["best"], state_dict["bad_checks"]

    # --- decisions --------------------------------------------------------------------------------------------------

    def milestones_due(self, epoch: int) -> dict[str, int]:
        """Return the thresholds of the milestones up to ``epoch`` that have not been passed, and take them as passed.

        Example::

            >>> from lightning_stale import ThresholdSchedule
            >>> schedule = ThresholdSchedule(milestones={1: {"lower": 1}, 2: {"upper": 9}, 5: {"upper": 6}})
            >>> [schedule.milestones_due(epoch) for epoch in (0, 3, 4, 5)]
            [{}, {'lower': 1, 'upper': 9}, {}, {'upper': 6}]
        """
        due: dict[str, int] = {}
        for milestone, thresholds in self.milestones.items():
            if self._last_milestone < milestone <= epoch:
                due |= thresholds
                self._last_milestone = milestone
        return due

    def thresholds_after(self, value: float, thresholds: Mapping[str, int]) -> dict[str, int]:
        """Compare ``value`` of the metric with the best so far; return what becomes of ``thresholds``.

        Example::

            >>> from lightning_stale import ThresholdSchedule
            >>> schedule = ThresholdSchedule(monitor="val_loss", patience=2, factor=0.5)
            >>> [schedule.thresholds_after(loss, {"threshold": 9}) for loss in (0.7, 0.6, 0.6, 0.8)]
            [{'threshold': 9}, {'threshold': 9}, {'threshold': 9}, {'threshold': 4}]
        """
        if value < self._best if self.mode == "min" else value > self._best:
            self._best, self._bad_checks = value, 0
            return dict(thresholds)
        self._bad_checks += 1
        if self._bad_checks < self.patience:
            return dict(thresholds)
        self._bad_checks = 0
        return {
            name: min(clocks, max(self.minimum, math.floor(clocks * self.factor)))
            for name, clocks in thresholds.items()
        }

    def _pass_milestones(self, trainer: Trainer) -> bool:
        due = self.milestones_due(trainer.current_epoch)
        if due:
            self._change(trainer, due, f"epoch {trainer.current_epoch}")
        return bool(due)

    def _check_metric(self, trainer: Trainer) -> None:
        if self.monitor is None:
            return
        strategy = _strategy(trainer)
        if trainer.is_global_zero:
            logged = trainer.callback_metrics
            if self.monitor not in logged:
                raise MisconfigurationException(
                    f"ThresholdSchedule(monitor={self.monitor!r}): no such metric has been logged; there are "
                    f"{', '.join(map(repr, logged)) or 'none'}. Log it in validation_step, or write monitor=... with "
                    "one of these."
                )
            value, before = float(logged[self.monitor]), strategy.paradigm.thresholds
            after = self.thresholds_after(value, before)
            if after != before:
                text = f"{self.monitor}={value:g} is no improvement over {self._best:g} after {self.patience} checks"
                self._change(trainer, after, text)
            self._thresholds = _lasting(strategy)
        # All meet: nobody trains on before the server has the thresholds, and all have the same state.
        state = strategy.broadcast(self.state_dict())
        self._thresholds, self._best, self._bad_checks = state["thresholds"], state["best"], state["bad_checks"]

    def _change(self, trainer: Trainer, thresholds: Mapping[str, int], why: str) -> None:
        strategy = _strategy(trainer)
        before = strategy.paradigm
        strategy.set_thresholds(**thresholds)
        rank_zero_info(f"ThresholdSchedule: {before!r} -> {strategy.paradigm!r} ({why})")


def _strategy(trainer: Trainer) -> StaleSyncStrategy:
    assert isinstance(trainer.strategy, StaleSyncStrategy)
    return trainer.strategy


def _lasting(strategy: StaleSyncStrategy) -> dict[str, int]:
    """Return the thresholds that a run which resumes has to set anew."""
    return {} if strategy.paradigm.adapts else strategy.paradigm.thresholds


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_milestones(milestones: object) -> dict[int, dict[str, int]]:
    example = "milestones={5: {'threshold': 8}} or {5: {'lower': 1, 'upper': 6}} or {5: {'delay': 8}}"
    if milestones is None:
        return {}
    if not isinstance(milestones, Mapping) or not milestones:
        raise ValueError(f"milestones={milestones!r}: write the thresholds from some epochs on, e.g. {example}")
    for epoch, thresholds in milestones.items():
        if not _is_count(epoch):
            raise ValueError(f"milestones={{{epoch!r}: ...}}: epochs are integers >= 0, e.g. {example}")
        if not isinstance(thresholds, Mapping) or not thresholds or not all(map(_is_count, thresholds.values())):
            raise ValueError(
                f"milestones={{{epoch}: {thresholds!r}}}: thresholds have names, and are integers >= 0, e.g. {example}"
            )
    return {epoch: dict(milestones[epoch]) for epoch in sorted(milestones)}
