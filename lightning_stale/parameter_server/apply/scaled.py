"""The staler than usual a gradient is, the smaller its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step


class Scaled(ApplyRule):
    """A smaller learning rate for gradients that are staler than the mean (``apply="scaled"``).

    With ``E[tau]``, the mean staleness of all pushes for this optimizer so far, this one included::

        learning rate * min(1, E[tau] / tau)

    Zhang et al. (arXiv 1511.05950) divide by ``tau`` itself, which with N workers is about N - 1 always, and so mostly
    a learning rate that is N - 1 times smaller. Here workers that are all equally stale keep theirs. What is damped
    most comes from slow workers or samples: where they also differ in what there is to learn from them (long
    sequences), that biases learning (arXiv 2605.02043). An optimizer whose step does not depend on the learning rate in
    its param groups is not damped.

    Number and sum of the stalenesses are in checkpoints, and go on whatever the number of workers.

    Example::

        >>> import torch
        >>> from lightning_stale import Scaled, StalePush
        >>> rule, g = Scaled(), [torch.ones(1)]
        >>> def factor(staleness):
        ...     return rule.step(StalePush(0, 0, staleness, places=[0], gradients=g, weights=g)).lr_factor
        >>> [factor(staleness) for staleness in (0, 2, 4, 2)]
        [1.0, 0.5, 0.5, 1.0]
    """

    def __init__(self) -> None:
        self._counted: dict[int, list[int]] = {}  # per optimizer: pushes, and the sum of their staleness

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if not all("lr" in group for group in optimizer.param_groups):
                raise ValueError(
                    f"{type(optimizer).__name__} has no 'lr' in its param groups, which apply=Scaled() changes: write "
                    "another optimizer or apply='plain'"
                )

    def step(self, push: StalePush) -> Step:
        counted = self._counted.setdefault(push.optimizer, [0, 0])
        counted[0] += 1
        counted[1] += push.staleness
        mean = counted[1] / counted[0]
        return Step(push.gradients, lr_factor=min(1.0, mean / push.staleness) if push.staleness > 0 else 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"counted": {optimizer: list(counted) for optimizer, counted in self._counted.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counted = {int(optimizer): list(counted) for optimizer, counted in state["counted"].items()}
