"""Gradients that are too stale are not applied."""

from __future__ import annotations

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step


class Ringmaster(ApplyRule):
    """A gradient is applied if its staleness is below a bound, and let go otherwise (``apply="ringmaster"``).

    Ringmaster ASGD (arXiv 2501.16168, algorithm 4)::

        tau < R:  step with g
        else:     no step; the worker pulls the newest weights

    What is let go is computed for nothing, and its samples are not seen in this epoch. Workers or samples that are slow
    are let go more often than others: where they also differ in what there is to learn from them (long sequences), that
    biases learning (arXiv 2605.02043). ``strategy.summary()`` counts what was refused, per worker.

    Args:
        R: the staleness, in updates, from which on a gradient is let go. ``None``: twice the number of workers, times
            the number of optimizers if there are several. Equal workers see a staleness of about ``workers - 1``, so
            with that default a worker is let go where it takes more than about twice as long as the others.

    Raises:
        ValueError: if ``R`` is not an integer >= 1.

    Example::

        >>> import torch
        >>> from lightning_stale import Ringmaster, StalePush
        >>> rule, g = Ringmaster(R=8), [torch.ones(2)]
        >>> rule.step(StalePush(worker=0, optimizer=0, staleness=7, places=[0], gradients=g, weights=g))
        Step(gradients=[tensor([1., 1.])], lr_factor=1.0)
        >>> rule.step(StalePush(worker=0, optimizer=0, staleness=8, places=[0], gradients=g, weights=g)) is None
        True
    """

    def __init__(self, R: int | None = None) -> None:  # noqa: N803 - as the paper has it
        if R is not None and (isinstance(R, bool) or not isinstance(R, int) or R < 1):
            raise ValueError(
                f"Ringmaster(R={R!r}): R counts updates and must be an integer >= 1, e.g. Ringmaster(R=8), or None for "
                "twice the number of workers"
            )
        self.R = R

    def begin(self, workers: int, optimizers: int) -> None:
        if self.R is None:
            self.R = 2 * workers * optimizers

    def step(self, push: StalePush) -> Step | None:
        assert self.R is not None
        return Step(push.gradients) if push.staleness < self.R else None

    def __repr__(self) -> str:
        return f"Ringmaster(R={self.R})"
