"""The comparison as a figure: speed beside staleness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_stale.simulation.choice import Choice
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.step_times import StepTimes

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # of Okabe and Ito, told apart by all, and in grey by lightness


def draw_figure(
    path: Path, times: StepTimes, ddp: Outcome, outcomes: Sequence[Outcome], choice: Choice, max_staleness: int
) -> None:
    """Write the figure to ``path``; what its name ends in says the format.

    Args:
        path: of the file.
        times: for title and limit.
        ddp: the baseline.
        outcomes: of the settings.
        choice: is marked.
        max_staleness: is drawn as a line.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for a format that it does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [ddp, *outcomes]
    figure = Figure(figsize=(8, 1.6 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, stale = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for place, row in zip(places, rows, strict=True):
        on_demand = row.data == "on-demand"
        speed.barh(
            place,
            row.rate / ddp.rate,
            color=GREY if row is ddp else ORANGE if on_demand else BLUE,
            edgecolor="black",
            hatch="//" if on_demand else "",
            linewidth=0.6,
        )
        speed.text(row.rate / ddp.rate, place, f" {row.rate / ddp.rate:.2f}", va="center", fontsize="small", bbox=plain)
        if row is ddp:
            continue
        stale.plot([0, row.max_staleness], [place, place], color="black", linewidth=0.6)
        stale.plot(row.mean_staleness, place, "o", color="black", markersize=5)
        stale.plot(row.quantile(0.99), place, "|", color="black", markersize=11, markeredgewidth=2)
        stale.plot(row.max_staleness, place, "x", color="black", markersize=5)
    limit = times.own_rates / ddp.rate
    speed.axvline(limit, color="black", linestyle=":", linewidth=1)
    speed.set_xlim(0, 1.18 * max(limit, *(row.rate / ddp.rate for row in rows)))
    speed.set_xlabel("samples/s over those of ddp\n(dotted: all workers alone)")
    stale.axvline(max_staleness, color="black", linestyle="--", linewidth=1)
    stale.set_xlim(left=0)
    stale.set_xlabel("updates of staleness: dot mean, bar 99 %,\ncross max (dashed: allowed)")
    speed.set_yticks(list(places), [row.name.removesuffix("@on-demand") for row in rows])
    speed.get_yticklabels()[rows.index(choice.outcome)].set_fontweight("bold")
    speed.invert_yaxis()
    for axes in (speed, stale):
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=BLUE, edgecolor="black", label="shards"),
        Patch(facecolor=ORANGE, edgecolor="black", hatch="//", label="data on demand"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    figure.suptitle(times.name, x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=150)
