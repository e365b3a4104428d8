"""A gradient is corrected, to first order, for how the weights have moved since it was computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step
from lightning_stale.parameter_server.apply.parameter_state import ParameterState, put, real

_DECAY, _EPS = 0.95, 1e-7  # the paper's `m` and epsilon


class DelayCompensated(ApplyRule):
    """The gradient at the weights of now, estimated from that at the weights of then (``apply="delay-compensated"``).

    DC-ASGD (arXiv 1609.08326, algorithm 2 and section 6; ``*`` is by element)::

        g + lambda * g * g * (w_now - w_then)
        lambda = lambda_                        adaptive=False (DC-ASGD-c)
        lambda = lambda_ / sqrt(m + 1e-7)       adaptive=True  (DC-ASGD-a), with m = 0.95 m + 0.05 g * g over all pushes

    ``g * g`` stands for the diagonal of the Hessian, which it resembles where the loss is a log-likelihood (cross
    entropy) near its minimum. A gradient that is not stale stays as it is. The server holds ``w_then``, a copy of the
    weights for each worker that is connected by TCP (none in shared memory), and ``m``, which is in checkpoints.

    Args:
        lambda_: how much is compensated; ``None``: as in the paper, 2.0 where it is adaptive and 0.04 where it is not.
        adaptive: whether lambda follows the size of the gradients.

    Raises:
        ValueError: if ``lambda_`` is not a finite number >= 0, or ``adaptive`` not a bool.

    Example::

        >>> import torch
        >>> from lightning_stale import DelayCompensated, StalePush
        >>> rule = DelayCompensated(lambda_=0.5, adaptive=False)
        >>> now, then, g = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])
        >>> rule.step(StalePush(0, optimizer=0, staleness=1, places=[0], gradients=[g], weights=[now], then=[then]))
        Step(gradients=[tensor([-2.])], lr_factor=1.0)
    """

    needs_weights_then = True
    changes_gradients = True

    def __init__(self, lambda_: float | None = None, adaptive: bool = True) -> None:
        if not isinstance(adaptive, bool):
            raise ValueError(f"DelayCompensated(adaptive={adaptive!r}): write True or False")
        if lambda_ is not None and (
            isinstance(lambda_, bool)
            or not isinstance(lambda_, (int, float))
            or not (math.isfinite(lambda_) and lambda_ >= 0)
        ):
            raise ValueError(
                f"DelayCompensated(lambda_={lambda_!r}): write a number >= 0, e.g. DelayCompensated(lambda_=2.0), or "
                "None for the paper's"
            )
        self.lambda_ = (2.0 if adaptive else 0.04) if lambda_ is None else float(lambda_)
        self.adaptive = adaptive
        self._mean_square = ParameterState()

    def step(self, push: StalePush) -> Step:
        for place, gradient, now, then in zip(
            push.places, push.gradients, push.weights, push.weights_then, strict=True
        ):
            g = real(gradient)
            moved = real(now) - real(then)
            moved.mul_(g).mul_(g)  # in this order it is zero, and not NaN, where the weights are the same
            if self.adaptive:
                mean_square = self._mean_square.at((push.optimizer, place), g)
                mean_square.mul_(_DECAY).addcmul_(g, g, value=1 - _DECAY)
                moved.div_(torch.add(mean_square, _EPS).sqrt_())
            g.add_(moved, alpha=self.lambda_)
            put(g, gradient)
        return Step(push.gradients)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_square": self._mean_square.state_dict()} if self.adaptive else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.adaptive:
            self._mean_square.load_state_dict(state.get("mean_square", {}))

    def __repr__(self) -> str:
        return f"DelayCompensated(lambda_={self.lambda_}, adaptive={self.adaptive})"
