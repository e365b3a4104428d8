"""The steps that are left when a pipeline drains: every batch has then updated every block once."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from lightning_stale.pipeline.pipeline import Pipeline


class Draining:
    """Counts backwards since the last step, with accumulation over several batches as in training.

    Args:
        pipeline: with this rank's stages.
        step: lets the optimizer take a step with the gradients that are there, as training does.
    """

    def __init__(self, pipeline: Pipeline, step: Callable[[], object]) -> None:
        self._pipeline, self._step = pipeline, step
        self._since_step = 0

    def note_backward(self) -> None:
        """A batch has been run backward."""
        self._since_step += 1

    def note_step(self) -> None:
        """The optimizer has taken a step."""
        self._since_step = 0

    def forget_batches(self) -> None:
        """Begin anew: no batch is under way."""
        self._pipeline.restart()
        self._since_step = 0

    def drain(self, optimizer: Optimizer, group: int) -> None:
        """Run the backwards that are left, with a step after each ``group`` of them, and a last one for the rest."""
        if self._since_step == 0:  # what the last step has used
            optimizer.zero_grad()

        def take() -> None:
            self._step()
            optimizer.zero_grad()
            self._since_step = 0

        def after_backward() -> None:
            self._since_step += 1
            if self._since_step >= group:
                take()

        self._pipeline.drain(after_backward)
        if self._since_step > 0:
            take()
