"""Show how stale training is, and who waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_info
from rich.console import Console

from lightning_stale.callbacks.monitoring import Meter, file, meter_of
from lightning_stale.callbacks.monitoring.histograms import log_histograms
from lightning_stale.callbacks.monitoring.table import summary_table
from lightning_stale.private import of_lightning
from lightning_stale.strategies.base import StaleStrategy


class StalenessMonitor(Callback):
    """Log staleness, waiting and speed; at the end of ``fit``, print a table of all and write ``staleness.json``.

    With every strategy of this package. Logged through Lightning's own ``log``, **of this worker** whenever the Trainer
    logs (``log_every_n_steps``), as means over the batches since, on the rank that the logger belongs to:

    - ``staleness/samples_per_s``: loading not counted; where Lightning can tell the size of a batch, which that of the
      last one is taken to be;
    - with a parameter server: ``staleness/lead`` (clocks ahead of the slowest worker, at the OK),
      ``staleness/gradient`` (updates between pull and push), ``staleness/wait_share`` (of the time, 0..1),
      ``staleness/leases`` (held now; where batches are handed out), ``staleness/refused`` (share of pushes that the
      apply rule let go; with a rule other than ``"plain"``), and once an epoch and when they change, the thresholds in
      force: ``staleness/threshold``, or ``lower`` and ``upper``, or ``delay``, where they adapt as of the last meeting
      point;
    - with HPSGD: ``staleness/steps_per_round`` and ``staleness/hidden`` (share of the exchange in which the worker
      trained, 0..1) of the last rounds, and ``staleness/wait_share``;
    - with DSP: ``staleness/utilisation`` of this rank's stages together, ``staleness/wait_features`` and
      ``wait_gradients``, all shares of the time, 0..1, and ``staleness/features_queued`` and ``gradients_queued`` (how
      many it found waiting); of those that it receives.

    **Of all together** at the end of each epoch, on rank 0, from ``strategy.summary()``, of the fit so far, under
    ``staleness/all/...``:

    - with a parameter server: ``updates``, ``lead``, ``max_lead``, ``gradient``, ``max_gradient``, ``wait_share``,
      ``samples_per_s``, and where there are such ``refused``, ``leases`` and ``taken_back``;
    - with HPSGD: ``rounds``, ``steps_per_round``, ``hidden``, ``wait_share`` and ``samples_per_s``;
    - with DSP: ``stage0/utilisation`` and so on, the fields of the summary of each stage.

    A TensorBoardLogger and a WandbLogger also get the histograms ``staleness/all/lead`` and ``staleness/all/gradient``.

    Args:
        prog_bar: show a short line of this worker in the progress bar.
        print_summary: print the table of ``strategy.summary()`` at the end of ``fit``.
        save_summary: write it to ``staleness.json`` too, in the folder of the logger (``log_dir``), or else in
            ``default_root_dir``; what an earlier fit has left there is kept, and the file is ``staleness-v1.json``
            then. Nothing is written with ``fast_dev_run``.

    Raises:
        MisconfigurationException: in ``fit``, with a strategy of somebody else.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import StalenessMonitor
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="ssp", callbacks=[StalenessMonitor()],
        ...                   logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, prog_bar: bool = True, print_summary: bool = True, save_summary: bool = True) -> None:
        self.prog_bar = prog_bar
        self.print_summary = print_summary
        self.save_summary = save_summary
        self._meter: Meter | None = None
        self._started = 0.0
        self._logged: tuple[str, ...] = ()  # in the last batch
        self._conditions: tuple[int, dict[str, float]] = (-1, {})
        self._undo: Callable[[], object] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to show, and have a line in the progress bar."""
        self._meter = meter = meter_of(trainer.strategy)
        self._logged, self._conditions = (), (-1, {})
        if meter is None:
            raise MisconfigurationException(
                f"StalenessMonitor shows who waits and how stale gradients are, and {type(trainer.strategy).__name__} "
                "counts nothing of it: write Trainer(strategy='dssp'), or another one of lightning_stale, or leave the "
                "monitor out"
            )
        if self.prog_bar and stage == "fit" and trainer.progress_bar_callback is not None:
            self._undo = _show_line(trainer, meter)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note when the step began."""
        if self._logged:
            of_lightning.pass_over_logged(trainer, self._logged)
            self._logged = ()
        self._require_meter().begin_batch()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what this worker knows, and log it where the Trainer logs."""
        meter = self._require_meter()
        meter.end_batch(time.perf_counter() - self._started)
        if of_lightning.logs_now(trainer):
            values = meter.of_this_worker(_size(batch))
            if values:
                values |= self._changed(meter.conditions(), trainer.current_epoch)
                values = {f"staleness/{name}": value for name, value in values.items()}
                pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
                self._logged = tuple(values)

    def _changed(self, conditions: dict[str, float], epoch: int) -> dict[str, float]:
        """Return ``conditions`` if they are others than those logged in this epoch: each log takes its time."""
        before, self._conditions = self._conditions, (epoch, conditions)
        return conditions if self._conditions != before else {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is known of all; they have just met."""
        if not trainer.is_global_zero:
            return
        summary, meter = _strategy(trainer).summary(), self._require_meter()
        values = {f"staleness/all/{name}": value for name, value in meter.of_all(summary).items()}
        # nothing is reduced with rank_zero_only; without sync_dist, Lightning would recommend it for each of them
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, rank_zero_only=True)
        histograms = {f"staleness/all/{name}": counts for name, counts in meter.histograms(summary).items()}
        log_histograms(trainer.loggers, histograms, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, and write the file."""
        if not trainer.is_global_zero:
            return
        summary = _strategy(trainer).summary()
        if self.print_summary:
            Console().print(summary_table(summary))
        if self.save_summary and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = file.write(file.folder_of(trainer), file.content(trainer, summary))
            rank_zero_info(f"StalenessMonitor: the numbers are in {path}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the progress bar back."""
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the progress bar back."""
        self._undo()

    def _require_meter(self) -> Meter:
        assert self._meter is not None
        return self._meter


def _show_line(trainer: Trainer, meter: Meter) -> Callable[[], object]:
    """Add the line to what the progress bar shows, when it shows it; return what undoes it."""
    bar = trainer.progress_bar_callback
    assert bar is not None
    shown = bar.get_metrics

    def get_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {**meter.line(), **shown(trainer, pl_module)}  # the user's own comes first where names are equal

    return of_lightning.replace(bar, "get_metrics", get_metrics)


def _size(batch: Any) -> int | None:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:  # Lightning cannot tell how large such a batch is
        return None


def _strategy(trainer: Trainer) -> StaleStrategy:
    assert isinstance(trainer.strategy, StaleStrategy)
    return trainer.strategy
