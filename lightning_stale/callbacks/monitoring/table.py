"""``strategy.summary()`` as a table that fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return ``summary()`` of any strategy of this package as a table: a row per worker, or per stage.

    Example::

        >>> from rich.console import Console
        >>> row = {"rank": 0, "steps": 12, "rounds": 3, "steps_per_round": 4.0, "hidden": 0.9, "wait_s": 0.1,
        ...        "compute_s": 0.9}
        >>> Console(width=80).print(  # doctest: +NORMALIZE_WHITESPACE
        ...     summary_table({"paradigm": "HPSGD", "updates": 3, "workers": [row]})
        ... )
                                HPSGD: 3 rounds
        <BLANKLINE>
          rank   steps   rounds   steps a round   hidden   waited   of the time
         ───────────────────────────────────────────────────────────────────────
             0      12        3            4.00      90%    0.1 s           10%
        <BLANKLINE>
    """
    if "stages" in summary:
        return _of_pipeline(summary)
    return _of_rounds(summary) if "phases" not in summary else _of_pushes(summary)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _waited(worker: Mapping[str, Any]) -> tuple[str, str]:
    total_s = max(worker["wait_s"] + worker["compute_s"], 1e-9)
    return f"{_number(worker['wait_s'])} s", f"{worker['wait_s'] / total_s:.0%}"


def _number(seconds: float) -> str:
    """Return at most six characters, up to eleven days."""
    return f"{seconds:.1f}" if seconds < 9999.5 else f"{seconds:.0f}"


def _of_pushes(summary: Mapping[str, Any]) -> Table:
    rule = summary.get("apply", "Plain()")  # files of earlier runs have none
    name = summary["paradigm"] if rule == "Plain()" else f"{summary['paradigm']}, {rule}"
    refused = ["refused"] if any(worker.get("refused") for worker in summary["workers"]) else []
    share = "share" if refused else "of the time"  # 80 columns
    table = _table(
        f"{name}: {summary['updates']} updates",
        ["rank", "pushes", *refused, "lead (max)", "staleness (max)", "waited", share],
    )
    for worker in summary["workers"]:
        table.add_row(
            str(worker["rank"]),
            str(worker["pushes"]),
            *(str(worker[name]) for name in refused),
            f"{worker['mean_lead']:.2f} ({worker['max_lead']})",
            f"{worker['mean_staleness']:.2f} ({worker['max_staleness']})",
            *_waited(worker),
        )
    if len(summary["phases"]) > 1:
        table.caption = "\n".join(
            f"from update {phase['since']}: {', '.join(f'{k}={v}' for k, v in phase['thresholds'].items())}, "
            f"largest lead {phase['max_lead']}"
            for phase in summary["phases"]
        )
    return table


def _of_rounds(summary: Mapping[str, Any]) -> Table:
    table = _table(
        f"{summary['paradigm']}: {summary['updates']} rounds",
        ["rank", "steps", "rounds", "steps a round", "hidden", "waited", "of the time"],
    )
    for worker in summary["workers"]:
        table.add_row(
            str(worker["rank"]),
            str(worker["steps"]),
            str(worker["rounds"]),
            f"{worker['steps_per_round']:.2f}",
            f"{worker['hidden']:.0%}",
            *_waited(worker),
        )
    return table


def _of_pipeline(summary: Mapping[str, Any]) -> Table:
    staleness = tuple(summary["staleness"])
    table = _table(
        f"DSP, staleness {staleness}",
        ["stage", "params", "busy", "share", "features", "queue", "gradients", "queue", "to send"],
    )
    for row in summary["stages"]:
        cells = (
            _number(row["busy_s"]),
            f"{row['utilisation']:.0%}",
            _number(row["wait_features_s"]),
            _queue(row["features_queued"]),
            _number(row["wait_gradients_s"]),
            _queue(row["gradients_queued"]),
            _number(row["wait_to_send_s"]),
        )
        table.add_row(str(row["stage"]), _short(row["parameters"]), *cells)
    table.padding = (0, 1, 0, 0)  # 80 columns
    table.caption = "in seconds: busy, and waiting for features, for gradients, and to send"
    return table


def _queue(mean: float | None) -> str:
    return "" if mean is None else f"{mean:.1f}"


def _short(number: int) -> str:
    """Return at most seven characters."""
    for unit, name in ((10**9, " G"), (10**6, " M")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)
