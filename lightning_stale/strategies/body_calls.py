"""In each step of the user's, the one call of the module that was cut leads into the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn

from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.values.trees import tensors
from lightning_stale.private import of_lightning
from lightning_stale.strategies.same_batches import SameBatches

_BACKWARD, _STEP, _DRAIN = range(3)


class _StageDoneError(Exception):
    """Ends a step on a rank without the last stage: what comes after the body is another rank's."""


class BodyCalls:
    """Counts the calls of the body in a step, runs the stages in the first, and knows which step it is.

    Args:
        trainer: of this run.
        pipeline: with this rank's stages.
        same: what the ranks have in common.
        owner: the module that was cut.
        rank: this one.
    """

    def __init__(self, trainer: Trainer, pipeline: Pipeline, same: SameBatches, owner: nn.Module, rank: int) -> None:
        self._trainer, self._pipeline, self._same, self._owner, self._rank = trainer, pipeline, same, owner, rank
        self._path: tuple[int, ...] = ()  # what tells the present step from all others
        self._evaluated = 0
        self._calls: int | None = None  # of the body, in a step

    def train(self, step: Callable[[], Any]) -> Any:
        """Run a training step; where the last stage is elsewhere, return a loss that leads nowhere."""
        output: Any = torch.zeros((), device=self._trainer.strategy.root_device, requires_grad=True)
        with self._step():
            output = step()
            if not self._calls:
                raise MisconfigurationException(self._call_what_was_cut())
        if output is None:
            raise MisconfigurationException(
                "training_step returned None after the stages had run the batch: return a loss, e.g. 0 * loss"
            )
        return output

    def evaluate(self, step: Callable[[], Any]) -> Any:
        """Run a step of validation, test or prediction; ``None`` where the last stage is elsewhere."""
        with self._step():
            return step()
        return None

    def forward(self, features: tuple[Any, ...]) -> Any:
        """Run the body on ``features``, its arguments in the order of its signature."""
        training = self._calls is not None and self._trainer.training
        several = self._trainer.world_size > 1
        if several and self._calls is None:
            raise MisconfigurationException(
                "the body was called outside of a step, where the stages do not run one after the other: call it in "
                "training_step, validation_step, test_step or predict_step, and keep what a later hook needs"
            )
        if self._calls and (training or several):
            raise MisconfigurationException(
                "the body was called twice in one training_step, validation_step, test_step or predict_step, and a "
                "pipeline runs each batch through once: call it once, on the concatenated inputs"
            )
        if self._calls is not None:
            self._calls += 1
        run = self._pipeline.evaluate
        if training and not of_lightning.skips_backward(self._trainer):
            if any(tensor.requires_grad for tensor in tensors(features)):
                raise MisconfigurationException(
                    "what training_step computes before the module that was cut has parameters to train, which no "
                    "stage owns: make it part of that module, or freeze it"
                )
            run = self._pipeline.forward
        tell = self._same.tell(features)
        result = run(features, tell)
        if result is None:
            raise _StageDoneError
        if self._calls is not None:
            self._same.compare(tell, self._pipeline.told, self._place())
        return result[0]

    # --- random numbers of this rank's own --------------------------------------------------------------------------

    def before_backward(self) -> None:
        """What a backward draws follows from here."""
        self._draw_apart(_BACKWARD)

    def before_step(self) -> None:
        """What an optimizer's step draws follows from here."""
        self._draw_apart(_STEP)

    def before_drain(self) -> None:
        """What draining draws follows from here."""
        self._draw_apart(_DRAIN)

    def _draw_apart(self, what: int) -> None:
        self._same.streams.own((what, self._rank, *self._path))

    # --- one step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A rank without the last stage is done after the first call of the body."""
        trainer = self._trainer
        self._path = (int(trainer.training), trainer.fit_loop.total_batch_idx, self._evaluated)
        self._evaluated += 0 if trainer.training else 1
        self._calls = 0
        try:
            with self._same.streams.step(self._path):
                yield
        except _StageDoneError:
            pass
        except (RuntimeError, NotImplementedError) as error:
            if self._calls == 0 and trainer.world_size > 1 and "meta" in str(error):  # another rank's part of the model
                raise MisconfigurationException(self._call_what_was_cut()) from error
            raise
        finally:
            self._calls = None

    def _place(self) -> str:
        if self._trainer.training:
            return f"batch {self._trainer.fit_loop.batch_idx} of epoch {self._trainer.current_epoch}"
        return f"batch {self._evaluated - 1} of the evaluation"

    def _call_what_was_cut(self) -> str:
        model = self._trainer.lightning_module
        path = next(path for path, module in model.named_modules() if module is self._owner)
        if not path:
            return (
                "a step did not call self(...), whose forward the blocks of configure_stages() replace: write self(x) "
                "instead of, say, self.net(x) in training_step, validation_step, test_step and predict_step"
            )
        return (
            f"a step did not call self.{path.replace('_orig_mod.', '')}(...), the module that was cut: call it as a "
            "whole, or name the one that is called, DSPStrategy(module=...)"
        )
