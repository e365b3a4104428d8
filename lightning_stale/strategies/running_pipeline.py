"""This rank's stages of a model, from when it has been cut to the end of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_stale.events import Event
from lightning_stale.pipeline.channels.links import Links, destroy_mesh
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.replaced_forward import ReplacedForward, positional
from lightning_stale.pipeline.stage import Stage
from lightning_stale.private import of_lightning
from lightning_stale.strategies.assembly import Assembly
from lightning_stale.strategies.body_calls import BodyCalls
from lightning_stale.strategies.draining import Draining
from lightning_stale.strategies.same_batches import SameBatches


class RunningPipeline:
    """Runs the stages' backwards where the loss's is run, and all that are left when the ranks meet.

    Args:
        trainer: of this run.
        assembly: of all stages.
        stages: this rank's.
        same: what the ranks have in common.
        step: lets the optimizer take a step with the gradients that are there, as training does.
        connection: the channels to other ranks, and the mesh that they were made over; none on one rank.
        record: is told what happens.
    """

    def __init__(
        self,
        trainer: Trainer,
        assembly: Assembly,
        stages: Sequence[Stage],
        same: SameBatches,
        step: Callable[[], object],
        connection: tuple[Links, DeviceMesh] | None,
        record: Callable[[Event], None],
    ) -> None:
        channels = {} if connection is None else connection[0].channels
        self.pipeline = Pipeline(stages, **channels, first=assembly.mine.start, streams=same.streams, record=record)
        self.calls = BodyCalls(trainer, self.pipeline, same, assembly.owner(), trainer.global_rank)
        self.draining = Draining(self.pipeline, step)
        self._streams = same.streams
        self._connection = connection

    def replace_forward(self, module: LightningModule, owner: nn.Module) -> Callable[[], None]:
        """Let a call of ``owner``, the part of ``module`` that was cut, run the stages; return what undoes it."""
        arguments, calls = positional(owner), self.calls
        run = of_lightning.not_compiled(lambda *args, **kwargs: calls.forward(arguments(*args, **kwargs)))
        return of_lightning.replace_forward(module, owner, ReplacedForward(owner, run))

    def backward(
        self,
        loss: Tensor,
        optimizer: Optimizer | None,
        module: LightningModule,
        precision: Precision,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Back-propagate the loss where it is, and run the stages' backwards of this iteration."""
        with self._streams.apart():
            self.calls.before_backward()
            loss = precision.pre_backward(loss, module)
            if self.pipeline.has_last:
                started = time.perf_counter()
                precision.backward(loss, module, optimizer, *args, **kwargs)
                self.pipeline.note_backward(started)
            self.pipeline.backward()
            self.draining.note_backward()
            return precision.post_backward(loss, module)

    def step(self, take: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Take the step that follows a batch: ``take`` is given what runs the batch."""

        def closure_and_own_numbers() -> Any:
            result = closure()
            self.calls.before_step()
            return result

        with self._streams.apart():
            result = take(closure_and_own_numbers)
        self.draining.note_step()
        return result

    def drain(self, optimizer: Optimizer, group: int) -> None:
        """Let every batch update every block once, with a step per ``group`` of them; it fills anew then."""
        if self.pipeline.behind:
            with torch.enable_grad(), self._streams.apart():
                self.calls.before_drain()
                self.draining.drain(optimizer, group)
        self.pipeline.restart()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Return what a collective of all ranks runs in, at whatever batch each of them is."""
        self.pipeline.widen()
        with nullcontext() if self._connection is None else self._connection[0].quiet():
            yield

    def end(self, at_once: bool) -> None:
        """End the channels: once everything has been sent, or ``at_once``."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        links, mesh = connection
        try:
            if at_once:
                links.break_off()
            else:
                links.end()
        finally:
            destroy_mesh(mesh)
