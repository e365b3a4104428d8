"""Who waits: a bar per worker, or per stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_stale.plots.style import BLUE, GREEN, ORANGE, RED, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS = {  # colour and hatch of what the time was spent on
    "computing": (BLUE, ""),
    "waiting": (ORANGE, "///"),
    "waiting for features": (ORANGE, "///"),
    "waiting for gradients": (GREEN, "..."),
    "waiting to send": (RED, "xxx"),
    "other": ("#FFFFFF", ""),
}


def waiting(summary: Mapping[str, Any]) -> Figure:
    """Draw what each worker, or each stage of a pipeline, has spent its time on.

    Args:
        summary: ``trainer.strategy.summary()`` of any strategy of this package, or ``"summary"`` of a
            ``staleness.json``.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if there is no worker and no stage in it.

    Example::

        >>> from lightning_stale.plots import waiting
        >>> workers = [{"rank": 0, "compute_s": 9.0, "wait_s": 1.0}, {"rank": 1, "compute_s": 5.0, "wait_s": 5.0}]
        >>> figure = waiting({"paradigm": "SSP(threshold=3)", "workers": workers})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['10% waiting', '50% waiting']
    """
    rows = _rows(summary)
    if not rows:
        raise ValueError("summary has no worker and no stage: draw it after fit, trainer.strategy.summary()")
    figure = new_figure(7.0, 1.5 + 0.4 * len(rows))
    axes = figure.subplots()
    longest = max(sum(row.values()) for row in rows.values())
    for place, row in enumerate(rows.values()):
        left = 0.0
        for what, seconds in row.items():
            colour, hatch = _LOOKS[what]
            label = what if place == 0 else None
            axes.barh(
                place, seconds, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=label
            )
            left += seconds
        waited = sum(seconds for what, seconds in row.items() if what.startswith("waiting"))
        axes.text(
            left + 0.01 * longest, place, f"{waited / max(left, 1e-9):.0%} waiting", va="center", fontsize="small"
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel="time (s)", xlim=(0, 1.2 * max(longest, 1e-9)))
    bare(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def _rows(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return seconds by what they were spent on, by worker or stage."""
    if "stages" not in summary:
        return {
            f"worker {worker['rank']}": {"computing": worker["compute_s"], "waiting": worker["wait_s"]}
            for worker in summary["workers"]
        }
    rows = {}
    for stage in summary["stages"]:
        row = {
            "computing": stage["busy_s"],
            "waiting for features": stage["wait_features_s"],
            "waiting for gradients": stage["wait_gradients_s"],
            "waiting to send": stage["wait_to_send_s"],
        }
        elapsed_s = stage["busy_s"] / stage["utilisation"] if stage["utilisation"] else 0.0
        row["other"] = max(0.0, elapsed_s - sum(row.values()))  # loading, optimizers, other stages of the process
        rows[f"stage {stage['stage']}"] = row
    return rows
