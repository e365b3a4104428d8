"""A momentum per worker, so that workers do not push each other on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step
from lightning_stale.parameter_server.apply.parameter_state import ParameterState, put, real


class Dana(ApplyRule):
    """Nesterov's momentum, with one momentum vector per worker (``apply="dana"``).

    DANA-Slim (arXiv 1907.11612, section 4.2), computed in the server::

        v_i = momentum * v_i + g;  step with momentum * v_i + g

    A worker's gradient is then that at an estimate of where the weights will be once its own momentum has acted. The
    optimizer must have no momentum itself: write ``SGD(lr=...)``. With one worker this is
    ``SGD(momentum=..., nesterov=True)``, except for weight decay, which acts once per push here and not through the
    momentum: to the same effect, it is ``1 / (1 - momentum)`` times as large.

    The server holds ``v_i``, a copy of the weights for each worker, which is in checkpoints too. Resumed with another
    number of workers, each rank goes on with its own; further ones start with none.

    Args:
        momentum: ``gamma`` in the paper.

    Raises:
        ValueError: if ``momentum`` is not a number with ``0 <= momentum < 1``.

    Example::

        >>> import torch
        >>> from lightning_stale import Dana, StalePush
        >>> rule, w = Dana(momentum=0.5), [torch.zeros(1)]
        >>> for worker in (0, 1, 0):
        ...     push = StalePush(worker, optimizer=0, staleness=0, places=[0], gradients=[torch.ones(1)], weights=w)
        ...     print(rule.step(push).gradients)
        [tensor([1.5000])]
        [tensor([1.5000])]
        [tensor([1.7500])]
    """

    changes_gradients = True

    def __init__(self, momentum: float = 0.9) -> None:
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(f"Dana(momentum={momentum!r}): write a number >= 0 and < 1, e.g. Dana(momentum=0.9)")
        self.momentum = float(momentum)
        self._momenta = ParameterState()
        self._workers: int | None = None

    def begin(self, workers: int, optimizers: int) -> None:
        self._workers = workers

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name, own in (("momentum", group.get("momentum", 0)), ("betas", group.get("betas", (0,))[0])):
                    if own:
                        without = "momentum=0" if name == "momentum" else f"betas=(0.0, {group['betas'][-1]})"
                        raise ValueError(
                            f"{type(optimizer).__name__} has {name}={group[name]}, and apply={self!r} keeps a momentum "
                            f"per worker: the two would multiply. Write {type(optimizer).__name__}(..., {without}), "
                            "and no schedule of the momentum, or another rule"
                        )

    def step(self, push: StalePush) -> Step:
        for place, gradient in zip(push.places, push.gradients, strict=True):
            g = real(gradient)
            v = self._momenta.at((push.worker, push.optimizer, place), g)
            v.mul_(self.momentum).add_(g)
            g.add_(v, alpha=self.momentum)
            put(g, gradient)
        return Step(push.gradients)

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self._momenta.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._momenta.load_state_dict(
            state["momenta"], keep=lambda key: self._workers is None or key[0] < self._workers
        )

    def __repr__(self) -> str:
        return f"Dana(momentum={self.momentum})"
