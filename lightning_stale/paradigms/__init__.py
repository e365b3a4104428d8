"""BSP, ASP, SSP, DSSP and bounded delay as state machines over clocks and times: no torch, no I/O, no own clock.

The rules are those of Ho et al. (NIPS 2013), of arXiv 1908.11848, and of Li et al. (OSDI 2014).
"""

from __future__ import annotations

from lightning_stale.paradigms.asp import ASP
from lightning_stale.paradigms.base import ClockGate, Paradigm
from lightning_stale.paradigms.bounded_delay import BoundedDelay
from lightning_stale.paradigms.bsp import BSP
from lightning_stale.paradigms.dssp import DSSP
from lightning_stale.paradigms.ssp import SSP

PARADIGMS: dict[str, type[Paradigm]] = {
    "bsp": BSP,
    "asp": ASP,
    "ssp": SSP,
    "dssp": DSSP,
    "bounded-delay": BoundedDelay,
}


def as_paradigm(paradigm: str | Paradigm) -> Paradigm:
    """Return ``paradigm`` itself, or a new one with default thresholds for the name of one.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name nor a :class:`Paradigm`.
    """
    if isinstance(paradigm, Paradigm):
        return paradigm
    names = ", ".join(repr(name) for name in PARADIGMS)
    if isinstance(paradigm, str):
        try:
            return PARADIGMS[paradigm.lower()]()
        except KeyError:
            raise ValueError(
                f"paradigm={paradigm!r} is unknown: write one of {names}, or a Paradigm such as DSSP(lower=3, upper=15)"
            ) from None
    if isinstance(paradigm, type) and issubclass(paradigm, Paradigm):
        raise TypeError(f"paradigm={paradigm.__name__} is a class: write {paradigm.__name__}()")
    raise TypeError(f"paradigm={paradigm!r}: write one of {names}, or a Paradigm such as SSP(threshold=3)")


__all__ = ["ASP", "BSP", "DSSP", "PARADIGMS", "SSP", "BoundedDelay", "ClockGate", "Paradigm", "as_paradigm"]
