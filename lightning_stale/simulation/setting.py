"""A paradigm with its thresholds, or rounds of HPSGD, and how data is shared: what is compared, and how to write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, BoundedDelay, Paradigm

Data = Literal["shards", "on-demand"]
Interval = int | Literal["auto"]


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
        name, values, data = _take_apart(text)
        if name == "bounded-delay":
            given, _, where = text.partition("@")
            if where == "shards":
                raise ValueError(f"{text!r}: bounded-delay bounds what is handed out: write {given}, without @shards")
            data = "on-demand"
        try:
            make = _maker(name, values)
            make()
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"setting {text!r}: {error}. Write one of bsp, asp, ssp:3, dssp:3:15, hpsgd, hpsgd:4, bounded-delay:8, "
                "bounded-delay:auto, with @on-demand after all but the last two for data on demand"
            ) from None
        return Setting(text, make, data)


@dataclass(frozen=True)
class AveragingSetting:
    """One line of the comparison: HPSGD.

    Args:
        name: as it is written: ``"hpsgd"``, ``"hpsgd:4@on-demand"``.
        interval: steps of a round, or ``"auto"``: as many as an exchange takes.
        data: ``"shards"`` or ``"on-demand"``.
    """

    name: str
    interval: Interval
    data: Data


def parse_setting(text: str) -> Setting | AveragingSetting:
    """Return the setting that ``text`` names, be it of a paradigm or of HPSGD.

    Raises:
        ValueError: if it names none, with what to write.

    Example::

        >>> from lightning_stale.simulation import parse_setting
        >>> parse_setting("hpsgd:4@on-demand")
        AveragingSetting(name='hpsgd:4@on-demand', interval=4, data='on-demand')
    """
    name, values, data = _take_apart(text)
    if name != "hpsgd":
        return Setting.parse(text)
    [interval] = values or ["auto"] if len(values) < 2 else [":".join(values)]
    if interval == "auto":
        return AveragingSetting(text, "auto", data)
    if not interval.isdigit() or int(interval) < 1:
        raise ValueError(f"setting {text!r}: write hpsgd, or with a number of steps a round, e.g. hpsgd:4")
    return AveragingSetting(text, int(interval), data)


def _take_apart(text: str) -> tuple[str, list[str], Data]:
    given, _, where = text.partition("@")
    name, *values = given.strip().lower().split(":")
    if where not in ("", "shards", "on-demand"):
        raise ValueError(f"{text!r}: after @ write shards or on-demand")
    return name, values, "on-demand" if where == "on-demand" else "shards"


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


def usual(workers: int) -> list[Setting | AveragingSetting]:
    """Return what is compared if nothing else is asked for.

    Example::

        >>> from lightning_stale.simulation.setting import usual
        >>> [setting.name for setting in usual(4)][-3:]
        ['bounded-delay:4', 'bounded-delay:8', 'bounded-delay:auto']
    """
    names = ["bsp", "ssp:3", "dssp:3:15", "asp", "hpsgd", "ssp:3@on-demand", "asp@on-demand", "hpsgd@on-demand"]
    names += [f"bounded-delay:{workers}", f"bounded-delay:{2 * workers}", "bounded-delay:auto"]
    return [parse_setting(name) for name in names]
