"""Worker processes by spawn and fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lightning_stale.launchers.hydra.job import leave_group_of_one
from lightning_stale.private.of_launchers import MultiProcessingLauncher, forks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class SummaryLauncher(MultiProcessingLauncher):
    """Lightning's spawn and fork launcher; brings ``strategy.summary()`` of rank 0 back to the main process."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is not None:
            trainer.strategy.check_before_launch(trainer)  # type: ignore[attr-defined]
        leave_group_of_one()
        if forks(self):
            function = _with_one_thread(function)
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        return {**super().get_extra_results(trainer), "summary": trainer.strategy.summary()}  # type: ignore[attr-defined]

    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        trainer.strategy._summary = extra.pop("summary")  # type: ignore[attr-defined]
        super().update_main_process_results(trainer, extra)


def _with_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``function`` compute with one thread: OpenMP's others are not forked, and it would wait for them for ever."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.set_num_threads(1)
        return function(*args, **kwargs)

    return run
