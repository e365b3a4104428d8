"""In a worker: an optimizer's ``step`` becomes a push, a wait for the OK, and a pull."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.parameter_server.client import ParameterClient
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.store import parameter_places
from lightning_stale.strategies.binding import Binding, SharedBinding, StagedBinding


def unique_parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return the parameters of all ``optimizers``, each once, in the order of the optimizers and their param groups."""
    parameters: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameters.setdefault(id(parameter), parameter)
    return list(parameters.values())


class Exchange:
    """Replaces ``step`` of the user's optimizers, on the objects themselves, until :meth:`release`.

    So everything that leads up to a step stays Lightning's and torch's own: the closure, accumulation, unscaling,
    hooks, clipping; an overflow step of the gradient scaler never reaches ``step`` and pushes nothing. With a paradigm
    that averages, clipping is left to the server, which clips the mean as DDP does.

    In manual optimization a graph may be alive when an optimizer steps (two losses before the first step, as in many
    GANs): a push then brings back only what it has changed, as a plain optimizer changes nothing else, and
    :meth:`after_batch` the rest.

    Args:
        client: the connection to the server.
        names: of the model's parameters, by ``id``.
        optimizers: the user's; their state is the server's from now on.
        device: where the model is.
        precision: the precision plugin, which clips gradients.
        averages: whether the paradigm steps with the mean of a round.
        alone: whether this is the only worker.
        whole: whether a push brings back all weights at once, as no graph is alive then.
        guard: wraps a call that may wait for the server.
    """

    def __init__(
        self,
        client: ParameterClient,
        names: Mapping[int, str],
        optimizers: Sequence[Optimizer],
        device: torch.device,
        precision: Precision,
        averages: bool,
        alone: bool,
        whole: bool,
        guard: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._client = client
        self._optimizers = optimizers
        self._precision = precision
        self._guard = guard
        self._whole = whole
        self._behind = False  # whether a push has left weights as they were
        parameters = unique_parameters(optimizers)
        place = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._places = [parameter_places(optimizer, place) for optimizer in optimizers]
        named = {names.get(id(p), f"parameter {i} of the optimizers"): p for i, p in enumerate(parameters)}
        self._binding: Binding = (
            SharedBinding(client, named, alone) if device.type == "cpu" else StagedBinding(client, named, alone, device)
        )
        self._clips: dict[int, tuple[float, str]] = {}
        if averages:
            self._precision.clip_gradients = self._note_clipping  # type: ignore[method-assign]
        self._undo = [_replace_step(optimizer, self._push_of(index)) for index, optimizer in enumerate(optimizers)]

    def spread(self) -> None:
        """Have the weights that the client has pulled in the model."""
        self._behind = False
        self._binding.spread()

    def after_batch(self) -> None:
        """Pull what the pushes of this batch have left as it was."""
        if self._behind:
            self.look_for_changes()
            self._guard(self._client.refresh)
            self.spread()

    def look_for_changes(self) -> None:
        """Find weights that were changed outside of the optimizer; call before a pull."""
        self._binding.look_for_changes()

    def remember(self) -> None:
        """Take the weights as they are for those of the server (after a validation with other weights, say)."""
        self._binding.remember()

    def release(self) -> None:
        """Give the optimizers their own ``step`` back, and the model memory of its own."""
        for undo in self._undo:
            undo()
        self._precision.__dict__.pop("clip_gradients", None)
        self._binding.release()

    def _push_of(self, index: int) -> Callable[[], None]:
        return lambda: self._push(index)

    def _push(self, index: int) -> None:
        optimizer, places = self._optimizers[index], self._places[index]
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        if held != len(places):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} had {len(places)} parameters when fit started and has {held} now: the "
                "parameter server knows only those it started with. Give it all parameters in configure_optimizers and "
                "freeze them with requires_grad=False until they are to learn."
            )
        used = self._binding.collect(places)
        clip = self._clips.pop(id(optimizer), None)
        if any(used):
            options = read_options(optimizer)
            self._guard(lambda: self._client.push(index, places, used, options, clip, self._whole))
            self._binding.spread(None if self._whole else [p for p, u in zip(places, used, strict=True) if u])
            self._behind = not self._whole

    def _note_clipping(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0:
            raw = getattr(optimizer, "_optimizer", optimizer)  # a LightningOptimizer in manual optimization
            self._clips[id(raw)] = (float(clip_val), str(GradClipAlgorithmType(gradient_clip_algorithm).value))


def _replace_step(optimizer: Optimizer, push: Callable[[], None]) -> Callable[[], None]:
    """Let ``optimizer.step(closure)`` run the closure and ``push``; return what undoes it."""

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        push()
        self._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        return result

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    replaced = ("step", "_step_supports_amp_scaling")
    before = {name: value for name, value in vars(optimizer).items() if name in replaced}
    hooked = Optimizer.profile_hook_step(step)  # the user's step hooks run in the worker
    optimizer.step = MethodType(hooked, optimizer)  # type: ignore[method-assign]
    # A fused optimizer would unscale by itself, but its kernel runs in the server.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def undo() -> None:
        for name in replaced:
            optimizer.__dict__.pop(name, None)
        optimizer.__dict__.update(before)

    return undo
