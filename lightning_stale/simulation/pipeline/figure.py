"""The comparison of pipelines as a figure: speed beside staleness, and what each stage does with its time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_stale.simulation.figure import BLUE, GREY, ORANGE
from lightning_stale.simulation.pipeline.choice import PipelineChoice
from lightning_stale.simulation.pipeline.outcome import PipelineOutcome

SKY = "#56B4E9"
PARTS = (
    ("computes", BLUE, ""),
    ("waits for features", ORANGE, "//"),
    ("for gradients", SKY, ".."),
    ("to send", GREY, "xx"),
)


def draw_pipelines(path: Path, title: str, outcomes: Sequence[PipelineOutcome], choice: PipelineChoice) -> None:
    """Write the figure to ``path``; what its name ends in says the format.

    Args:
        path: of the file.
        title: of what.
        outcomes: of the settings.
        choice: is marked.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for a format that it does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    stages = len(outcomes[0].stages)
    thickness = 0.8 / stages
    figure = Figure(figsize=(8, 1.9 + max(0.36, 0.08 * stages) * len(outcomes)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, time = figure.subplots(1, 2, sharey=True)
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for place, row in enumerate(outcomes):
        stale = max(row.staleness)
        speed.barh(
            place,
            row.efficiency,
            color=BLUE if stale else GREY,
            edgecolor="black",
            linewidth=0.6,
        )
        label = f"{row.efficiency:.2f}" + (f", {stale} stale" if stale else "")
        speed.text(row.efficiency + 0.05, place, label, va="center", fontsize="small", bbox=plain)
        for stage in range(stages):
            begin, at = 0.0, place + (stage - (stages - 1) / 2) * thickness
            shares = (row.utilisation[stage], *(row.waiting[what][stage] for what in row.waiting))
            for share, (_, colour, hatch) in zip(shares, PARTS, strict=True):
                time.barh(at, share, thickness, left=begin, color=colour, hatch=hatch, edgecolor="black", linewidth=0.3)
                begin += share
    speed.axvline(1.0, color="black", linestyle=":", linewidth=1)
    speed.set_xlim(0, 1.5)
    speed.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    speed.set_xlabel("batches/s over the slowest stage's alone\n(dotted); grey: no gradient is stale")
    time.set_xlim(0, 1)
    time.set_xlabel("share of the time, each stage,\nthe first on top")
    speed.set_yticks(range(len(outcomes)), [row.name for row in outcomes])
    speed.get_yticklabels()[list(outcomes).index(choice.outcome)].set_fontweight("bold")
    speed.invert_yaxis()
    for axes in (speed, time):
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=label) for label, colour, hatch in PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    figure.savefig(path, dpi=150)
