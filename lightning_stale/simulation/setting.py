"""A paradigm with its thresholds, and how it gets its data: what the simulator compares, and how to write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm

Data = Literal["shards", "on-demand"]


@dataclass(frozen=True)
class Setting:
    """One line of the comparison.

    Args:
        name: as it is written: ``"ssp:3"``, ``"asp@on-demand"``, ``"bounded-delay:auto"``.
        make: makes a fresh paradigm.
        data: ``"shards"`` or ``"on-demand"``.
    """

    name: str
    make: Callable[[], Paradigm]
    data: Data

    @staticmethod
    def parse(text: str) -> Setting:
        """Return the setting that ``text`` names.

        Raises:
            ValueError: if it names none, with what to write.

        Example::

            >>> from lightning_stale.simulation import Setting
            >>> setting = Setting.parse("dssp:3:15@on-demand")
            >>> setting.make(), setting.data
            (DSSP(lower=3, upper=15, enforce_upper=True), 'on-demand')
        """
        given, _, where = text.partition("@")
        name, *values = given.strip().lower().split(":")
        data: Data
        if where in ("", "shards"):
            data = "shards"
        elif where == "on-demand":
            data = "on-demand"
        else:
            raise ValueError(f"{text!r}: after @ write shards or on-demand")
        if name == "bounded-delay":
            if where == "shards":
                raise ValueError(f"{text!r}: bounded-delay bounds what is handed out: write {given}, without @shards")
            data = "on-demand"
        try:
            make = _maker(name, values)
            make()
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"setting {text!r}: {error}. Write one of bsp, asp, ssp:3, dssp:3:15, bounded-delay:8, "
                "bounded-delay:auto, with @on-demand after the first four for data on demand"
            ) from None
        return Setting(text, make, data)


def _maker(name: str, values: list[str]) -> Callable[[], Paradigm]:
    match name, values:
        case "bsp", []:
            return BSP
        case "asp", []:
            return ASP
        case "ssp", []:
            return SSP
        case "ssp", [threshold]:
            return lambda: SSP(int(threshold))
        case "dssp", []:
            return DSSP
        case "dssp", [lower, upper]:
            return lambda: DSSP(int(lower), int(upper))
        case "bounded-delay", []:
            return BoundedDelay
        case "bounded-delay", ["auto"]:
            return lambda: BoundedDelay("auto")
        case "bounded-delay", [delay]:
            return lambda: BoundedDelay(int(delay))
    raise ValueError("is unknown")


def usual(workers: int) -> list[Setting]:
    """Return what is compared if nothing else is asked for.

    Example::

        >>> from lightning_stale.simulation.setting import usual
        >>> [setting.name for setting in usual(4)][-3:]
        ['bounded-delay:4', 'bounded-delay:8', 'bounded-delay:auto']
    """
    names = ["bsp", "ssp:3", "dssp:3:15", "asp", "ssp:3@on-demand", "asp@on-demand"]
    names += [f"bounded-delay:{workers}", f"bounded-delay:{2 * workers}", "bounded-delay:auto"]
    return [Setting.parse(name) for name in names]
