"""This rank's stages of a model, from when it has been cut to the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_stale.pipeline.channels.links import Links, destroy_mesh
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.strategies.body_calls import BodyCalls
from lightning_stale.strategies.draining import Draining
from lightning_stale.strategies.same_batches import SameBatches


class RunningPipeline:
    """Runs the stages' backwards where the loss's is run, and all that are left when the ranks meet.

    Args:
        pipeline: with the stages.
        calls: lead the user's steps into it.
        same: what the ranks have in common.
        step: lets the optimizer take a step with the gradients that are there, as training does.
        connection: the channels to other ranks, and the mesh that they were made over; none on one rank.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        calls: BodyCalls,
        same: SameBatches,
        step: Callable[[], object],
        connection: tuple[Links, DeviceMesh] | None,
    ) -> None:
        self.pipeline, self.calls = pipeline, calls
        self.draining = Draining(pipeline, step)
        self._streams = same.streams
        self._connection = connection

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
                precision.backward(loss, module, optimizer, *args, **kwargs)
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
