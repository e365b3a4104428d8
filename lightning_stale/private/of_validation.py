"""Lightning's validation within fit, which is begun anew (read in 2.6.6); a test fails when a part of it moves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, WeightAveraging
from torch.utils.data import DataLoader

from lightning_stale.private.of_lightning import callbacks, replace

_SHOWN = ("_progress_bar_metrics", "_callback_metrics", "_logged_metrics")


class ValidationLoop:
    """The validation loop of ``fit``.

    Args:
        trainer: whose.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loop = trainer.fit_loop.epoch_loop.val_loop
        self._connector = trainer._logger_connector
        self._held: list[tuple[dict[str, Any], int | None]] | None = None  # what waits to be logged
        self._swaps: dict[WeightAveraging, int] = {}
        self._begun: dict[str, Any] = {}

    def wrap(self, run: Callable[[Callable[[], Any]], Any], accept: Callable[[], None]) -> Callable[[], None]:
        """Have ``run`` run a validation, with what does so by itself; return what undoes it.

        Args:
            run: instead of the loop's.
            accept: called when all of a validation is known, and nothing of it logged.
        """
        loop, connector = self._loop, self._connector
        plain, log_metrics, log_end = loop.run, connector.log_metrics, connector.log_eval_end_metrics

        def hold(metrics: dict[str, Any], step: int | None = None) -> None:
            if self._held is None:
                log_metrics(metrics, step)
            else:
                self._held.append((metrics, step))

        def log_eval_end_metrics(metrics: dict[str, Any]) -> None:
            if self._held is not None:
                accept()
                held, self._held = self._held, None
                for one, step in held:
                    log_metrics(one, step)
            log_end(metrics)

        undo = [
            replace(loop, "run", lambda: run(plain)),
            replace(connector, "log_metrics", hold),
            replace(connector, "log_eval_end_metrics", log_eval_end_metrics),
            *(
                replace(callback, "_swap_models", self._counting_swaps(callback))
                for callback in callbacks(self._trainer)
                if isinstance(callback, WeightAveraging)
            ),
        ]
        return lambda: [step() for step in undo].clear()

    def begin(self) -> None:
        """Note where a validation begins, and hold back what it logs."""
        loop, module = self._loop, self._trainer.lightning_module
        self._held = []
        self._swaps.clear()
        loop._module_mode.mode.clear()  # filled again where the modules change to eval mode
        self._begun = {
            "progress": deepcopy(loop.batch_progress.state_dict()),
            "seen": loop._seen_batches_per_dataloader.copy(),
            "shown": {name: dict(getattr(self._connector, name)) for name in _SHOWN},
            "hook": module._current_fx_name,
        }

    def break_off(self) -> None:
        """After an exception in a validation, let everything be as where it began."""
        trainer, loop, begun = self._trainer, self._loop, self._begun
        self._held = None
        if loop._module_mode.mode:
            loop._on_evaluation_model_train()
        for callback, swaps in self._swaps.items():
            if swaps % 2:
                callback._swap_models(trainer.lightning_module)
        loop.teardown()  # of the loader's processes
        loop.batch_progress.load_state_dict(begun["progress"])
        loop._seen_batches_per_dataloader = begun["seen"]
        trainer.lightning_module._current_fx_name = begun["hook"]
        self._connector.reset_results()
        loop._results.clear()
        loop._results.batch = loop._results.batch_size = loop._results.dataloader_idx = None
        for name, shown in begun["shown"].items():
            setattr(self._connector, name, shown)
        for bar in callbacks(trainer):
            if isinstance(bar, ProgressBar):  # it makes another one when a validation starts
                bar.on_validation_end(trainer, trainer.lightning_module)

    def end(self) -> None:
        """The validation is over, or this rank is."""
        self._held = None

    def load_anew(self) -> list[DataLoader[Any]]:
        """Make the loaders anew, with the samplers of now, and return them."""
        loop = self._loop
        if loop._combined_loader is None:
            return []
        seen = loop._seen_batches_per_dataloader.copy()
        loop._combined_loader = None
        loop.setup_data()
        loop._seen_batches_per_dataloader = seen
        return [] if loop._combined_loader is None else loop._combined_loader.flattened

    def _counting_swaps(self, callback: WeightAveraging) -> Callable[[Any], None]:
        swap = callback._swap_models

        def swap_models(module: Any) -> None:
            swap(module)
            self._swaps[callback] = self._swaps.get(callback, 0) + 1

        return swap_models
