"""The global weights and the optimizers that update them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.parameter_server.apply import ApplyRule, Plain, StalePush, Step
from lightning_stale.parameter_server.options import (
    Options,
    changed_options,
    read_options,
    scaled_learning_rates,
    write_options,
)
from lightning_stale.transport.layout import Layout


@dataclass(frozen=True)
class Push:
    """One worker's gradient for one optimizer.

    Args:
        optimizer: which optimizer it is for.
        used: for each parameter of that optimizer, whether there is a gradient.
        gradients: the worker's gradient buffer, one view per parameter of the store.
        options: the worker's current param-group values (see :mod:`~lightning_stale.parameter_server.options`).
        clip: clip the mean of the round at this value, by ``"norm"`` or ``"value"``.
        worker: its rank.
        staleness: the updates since it pulled.
        weights_then: the weights that the gradients were computed on, one tensor per parameter of the store, if the
            rule needs them.
        lasting: whether the worker may need the gradients as they are after this push.
    """

    optimizer: int
    used: Sequence[bool]
    gradients: Sequence[Tensor]
    options: Options
    clip: tuple[float, str] | None = None
    worker: int = 0
    staleness: int = 0
    weights_then: Sequence[Tensor] | None = None
    lasting: bool = False


class ParameterStore:
    """The weights ``w``, updated by the user's optimizers; counts the updates in :attr:`version`.

    Args:
        weights: the flat buffer (``torch.uint8``) that ``layout`` describes.
        layout: of the parameters.
        rule: how a pushed gradient is applied; it has begun.

    Attributes:
        views: the weights, one tensor per slot, as plain tensors.
    """

    def __init__(self, weights: Tensor, layout: Layout, rule: ApplyRule | None = None) -> None:
        self.weights = weights
        self.rule = Plain() if rule is None else rule
        self.version = 0
        self.views = layout.views(weights)
        self._parameters = [torch.nn.Parameter(view, requires_grad=_may_learn(view)) for view in self.views]
        self.optimizers: list[Optimizer] = []
        self._places: list[list[int]] = []
        self._in_several: set[int] = set()  # the places that more than one optimizer has
        self._own_options: list[set[tuple[int, str]]] = []  # what `step` itself keeps in its param groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights, one tensor per slot."""
        return self._parameters

    def set_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Use ``optimizers``, which are built over :attr:`parameters`."""
        place = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self.optimizers = list(optimizers)
        self._places = [parameter_places(optimizer, place) for optimizer in optimizers]
        self._own_options = [set() for _ in optimizers]
        holders = Counter(place for places in self._places for place in set(places))
        self._in_several = {place for place, count in holders.items() if count > 1}

    def places(self, optimizer: int) -> list[int]:
        """Return which slots belong to ``optimizer``, in the order of its param groups."""
        return self._places[optimizer]

    @torch.no_grad()
    def apply(self, push: Push) -> bool:
        """Take one full step with the gradient of one worker, as the rule has it (all but BSP).

        Returns:
            Whether the rule let it be applied.
        """
        gradients = {
            place: push.gradients[place]
            for place, used in zip(self._places[push.optimizer], push.used, strict=True)
            if used
        }
        if self.rule.changes_gradients:
            gradients = {
                place: gradient.clone() if push.lasting or place in self._in_several else gradient
                for place, gradient in gradients.items()
            }
        step = self._ask_rule(push, gradients)
        if step is None:
            return False
        self._step(push, dict(zip(gradients, step.gradients, strict=True)), float(step.lr_factor))
        return True

    def _ask_rule(self, push: Push, gradients: Mapping[int, Tensor]) -> Step | None:
        places, then = list(gradients), push.weights_then
        answer: object = self.rule.step(
            StalePush(
                worker=push.worker,
                optimizer=push.optimizer,
                staleness=push.staleness,
                places=places,
                gradients=list(gradients.values()),
                weights=[self.views[place] for place in places],
                then=None if then is None else [then[place] for place in places],
            )
        )
        if answer is None:
            return None
        if not isinstance(answer, Step):
            raise TypeError(
                f"{self.rule!r}.step() returned {answer!r}: return Step(push.gradients), or None for no step"
            )
        if len(answer.gradients) != len(places) or not 0 <= answer.lr_factor < math.inf:
            raise ValueError(
                f"{self.rule!r}.step() returned {len(answer.gradients)} gradients and lr_factor={answer.lr_factor}: "
                f"return one for each of the {len(places)} of the push, and a finite factor >= 0"
            )
        return answer

    @torch.no_grad()
    def apply_mean(self, pushes: Sequence[Push]) -> bool:
        """Take one step per optimizer with the mean of the gradients of a round, in the order given (BSP)."""
        for index in sorted({push.optimizer for push in pushes}):
            same = [push for push in pushes if push.optimizer == index]
            self._step(same[0], self._means(index, same))
        return True

    def _means(self, optimizer: int, pushes: Sequence[Push]) -> dict[int, Tensor]:
        means = {}
        for position, place in enumerate(self._places[optimizer]):
            given = [push.gradients[place] for push in pushes if push.used[position]]
            if given:
                if len(pushes) > 1 and place in self._in_several:
                    given[0] = given[0].clone()  # the worker may push the same gradient for the next optimizer
                # The worker waits for its OK: until then its gradient buffer is the server's to use.
                means[place] = _mean_into_first(given, len(pushes))
        return means

    def _step(self, first: Push, gradients: Mapping[int, Tensor], lr_factor: float = 1.0) -> None:
        optimizer, own = self.optimizers[first.optimizer], self._own_options[first.optimizer]
        write_options(optimizer, first.options, keep=own)
        for place, gradient in gradients.items():
            self._parameters[place].grad = gradient
        touched = [self._parameters[place] for place in gradients]
        if first.clip is not None:
            _clip(touched, *first.clip)
        before = read_options(optimizer)
        with scaled_learning_rates(optimizer, lr_factor):
            optimizer.step()
        own |= changed_options(before, read_options(optimizer))
        for parameter in touched:
            parameter.grad = None
        self.version += 1

    def rule_state(self) -> dict[str, Any]:
        """Return the rule's name and state, for a checkpoint."""
        return {"rule": type(self.rule).__name__, "state": self.rule.state_dict()}

    def resume_rule(self, saved: Mapping[str, Any] | None) -> None:
        """Let the rule go on from :meth:`rule_state` of a checkpoint, if that is of one of its kind."""
        if saved is not None and saved["rule"] == type(self.rule).__name__ and saved["state"]:
            self.rule.load_state_dict(saved["state"])

    def optimizer_state(self, index: int) -> dict[str, Any]:
        """Return the ``state_dict()`` of an optimizer, with those values of its param groups that ``step`` keeps."""
        state_dict = dict(self.optimizers[index].state_dict())
        groups = state_dict.pop("param_groups", [])  # Lightning's mock optimizer has none
        own: list[dict[str, Any]] = [{} for _ in groups]
        for group, name in self._own_options[index]:
            own[group][name] = groups[group][name]
        return {"state": {}, **state_dict, "param_groups": own}

    @torch.no_grad()
    def set_weights(self, places: Sequence[int], values: Sequence[Tensor]) -> None:
        """Set the weights at ``places`` to those of ``values``, which has one tensor per slot."""
        for place in places:
            self._parameters[place].copy_(values[place])

    def move_to(self, weights: Tensor, layout: Layout) -> None:
        """Keep the weights in the buffer ``weights`` from now on."""
        weights.copy_(self.weights)
        self.weights = weights
        self.views = layout.views(weights)
        for parameter, view in zip(self._parameters, self.views, strict=True):
            parameter.data = view


def parameter_places(optimizer: Optimizer, place: dict[int, int]) -> list[int]:
    """Return the places of an optimizer's parameters (``place``: by ``id``), in the order of its param groups."""
    return [place[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _may_learn(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _mean_into_first(gradients: Sequence[Tensor], count: int) -> Tensor:
    mean = gradients[0]
    for gradient in gradients[1:]:
        mean.add_(gradient)
    return mean.div_(count) if count > 1 else mean


def _clip(parameters: Sequence[torch.nn.Parameter], value: float, algorithm: str) -> None:
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, value)
    else:
        torch.nn.utils.clip_grad_value_(parameters, value)
