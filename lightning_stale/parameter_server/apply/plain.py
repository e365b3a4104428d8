"""The optimizer's step with the gradient as it is."""

from __future__ import annotations

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step


class Plain(ApplyRule):
    """The optimizer's step with the gradient as it came, however stale (``apply="plain"``).

    Example::

        >>> from lightning_stale import Plain, StaleSyncStrategy
        >>> StaleSyncStrategy(paradigm="asp", apply=Plain())
        StaleSyncStrategy(paradigm=ASP(), transport='auto')
    """

    def step(self, push: StalePush) -> Step:
        return Step(push.gradients)
