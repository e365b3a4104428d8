"""In a worker: an optimizer's ``step`` becomes a push, a wait for the OK, and a pull."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim import Optimizer

from lightning_stale.data.on_demand import BatchesOnDemand
from lightning_stale.parameter_server.client import ParameterClient
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.store import parameter_places
from lightning_stale.private import of_torch
from lightning_stale.strategies.updates.model_memory import ModelMemory, SharedModelMemory, StagedModelMemory
from lightning_stale.strategies.updates.update import unique_parameters


class Exchange:
    """Replaces ``step`` of the user's optimizers, on the objects themselves, until :meth:`release`.

    So everything that leads up to a step stays Lightning's and torch's own: the closure, accumulation, unscaling,
    hooks, clipping; an overflow step of the gradient scaler never reaches ``step`` and pushes nothing. Where
    clipping is left to the server, which clips the mean of a round as DDP does, it is told in :meth:`note_clipping`.

    In manual optimization a graph may be alive when an optimizer steps (two losses before the first step, as in many
    GANs): a push then brings back only what it has changed, as a plain optimizer changes nothing else, and
    :meth:`after_batch` the rest.

    Args:
        client: the connection to the server.
        names: of the model's parameters, by ``id``.
        optimizers: the user's; their state is the server's from now on.
        device: where the model is.
        alone: whether this is the only worker.
        whole: whether a push brings back all weights at once, as no graph is alive then.
        guard: wraps a call that may wait for the server.
        batches: hands out those of this worker, if they are: a push carries them, and its OK brings the next.
    """

    def __init__(
        self,
        client: ParameterClient,
        names: Mapping[int, str],
        optimizers: Sequence[Optimizer],
        device: torch.device,
        alone: bool,
        whole: bool,
        guard: Callable[[Callable[[], Any]], Any],
        batches: BatchesOnDemand | None = None,
    ) -> None:
        self._client = client
        self._optimizers = optimizers
        self._guard = guard
        self._batches = batches
        self._whole = whole
        self._behind = False  # whether a push has left weights as they were
        parameters = unique_parameters(optimizers)
        index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._indices = [parameter_places(optimizer, index_of) for optimizer in optimizers]
        named = {names.get(id(p), f"parameter {i} of the optimizers"): p for i, p in enumerate(parameters)}
        self._memory: ModelMemory = (
            SharedModelMemory(client, named, alone)
            if device.type == "cpu"
            else StagedModelMemory(client, named, alone, device)
        )
        self._clips: dict[int, tuple[float, str]] = {}
        self._undo = [
            of_torch.replace_step(optimizer, partial(self._push, number)) for number, optimizer in enumerate(optimizers)
        ]

    def spread(self) -> None:
        """Have the weights that the client has pulled in the model."""
        self._behind = False
        self._memory.spread()

    def after_batch(self) -> None:
        """Pull what the pushes of this batch have left as it was."""
        if self._behind:
            self.look_for_changes()
            self._guard(self._client.refresh)
            self.spread()

    def look_for_changes(self) -> None:
        """Find weights that were changed outside of the optimizer; call before a pull."""
        self._memory.look_for_changes()

    def remember(self) -> None:
        """Take the weights as they are for those of the server (after a validation with other weights, say)."""
        self._memory.remember()

    def note_clipping(self, optimizer: Optimizer, value: float, algorithm: GradClipAlgorithmType) -> None:
        """Have the server clip the mean of the round in the next step of ``optimizer``, or of its wrapper."""
        raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self._clips[id(raw)] = (value, str(algorithm.value))

    def release(self) -> None:
        """Give the optimizers their own ``step`` back, and the model memory of its own."""
        for undo in self._undo:
            undo()
        self._memory.release()

    def _push(self, number: int) -> None:
        optimizer, indices = self._optimizers[number], self._indices[number]
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        if held != len(indices):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} had {len(indices)} parameters when fit started and has {held} now: the "
                "parameter server knows only those it started with. Give it all parameters in configure_optimizers and "
                "freeze them with requires_grad=False until they are to learn."
            )
        used = self._memory.collect(indices)
        if self._batches is not None and self._batches.spare:
            self._batches.took_step(None)
            return
        clip = self._clips.pop(id(optimizer), None)
        if any(used):
            options = read_options(optimizer)
            leases = () if self._batches is None else self._batches.leases
            last = self._batches is None or not self._batches.manual  # of the batch; otherwise nobody knows
            asks = self._batches is not None and last
            push = partial(self._client.push, number, indices, used, options, clip, self._whole, leases, asks, last)
            release = self._guard(push)
            self._memory.spread(None if self._whole else [p for p, u in zip(indices, used, strict=True) if u])
            self._behind = not self._whole
            if self._batches is not None and asks:
                self._batches.took_step(release.grant)
            elif self._batches is not None:
                self._batches.note_step()
