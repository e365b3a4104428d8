"""Apply rules: how the server steps with a gradient that was computed on older weights; one rule per file.

The rules are those of arXiv 2501.16168, 1609.08326 and 1907.11612, and a tamer form of 1511.05950.
"""

from __future__ import annotations

import cloudpickle

from lightning_stale.parameter_server.apply.base import ApplyRule, StalePush, Step
from lightning_stale.parameter_server.apply.dana import Dana
from lightning_stale.parameter_server.apply.delay_compensated import DelayCompensated
from lightning_stale.parameter_server.apply.plain import Plain
from lightning_stale.parameter_server.apply.ringmaster import Ringmaster
from lightning_stale.parameter_server.apply.scaled import Scaled

RULES: dict[str, type[ApplyRule]] = {
    "plain": Plain,
    "ringmaster": Ringmaster,
    "delay-compensated": DelayCompensated,
    "dana": Dana,
    "scaled": Scaled,
}


def as_apply_rule(apply: str | ApplyRule, averages: bool = False) -> ApplyRule:
    """Return ``apply`` itself, or a new rule with default values for the name of one.

    Args:
        apply: a name or a rule.
        averages: whether the paradigm steps with the mean of a round, so that no gradient is stale.

    Raises:
        ValueError: for an unknown name, or a rule where no gradient is stale.
        TypeError: for anything that is neither a name nor an :class:`ApplyRule`, or a rule that cannot be pickled.
    """
    rule = _made(apply)
    if averages and type(rule) is not Plain:
        raise ValueError(
            f"apply={apply!r} is a rule for stale gradients, and a paradigm that averages a round has none: leave "
            "apply='plain', or write paradigm='asp', 'ssp', 'dssp' or 'bounded-delay'"
        )
    try:
        cloudpickle.dumps(rule)
    except Exception as error:
        raise TypeError(
            f"apply={apply!r} cannot be sent to the parameter server: {error}. Keep locks, files and loggers out of "
            "its attributes."
        ) from error
    return rule


def _made(apply: str | ApplyRule) -> ApplyRule:
    if isinstance(apply, ApplyRule):
        return apply
    names = ", ".join(repr(name) for name in RULES)
    if isinstance(apply, str):
        if apply not in RULES:
            raise ValueError(
                f"apply={apply!r} is unknown: write one of {names}, or an ApplyRule such as Ringmaster(R=8)"
            )
        return RULES[apply]()
    if isinstance(apply, type) and issubclass(apply, ApplyRule):
        raise TypeError(f"apply={apply.__name__} is a class: write {apply.__name__}()")
    raise TypeError(f"apply={apply!r}: write one of {names}, or an ApplyRule such as Ringmaster(R=8)")


__all__ = [
    "RULES",
    "ApplyRule",
    "Dana",
    "DelayCompensated",
    "Plain",
    "Ringmaster",
    "Scaled",
    "StalePush",
    "Step",
    "as_apply_rule",
]
