"""What all figures have in common: colours, markers, hatches, and how a figure is made without a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#56B4E9")
"""Of Okabe and Ito, Color Universal Design."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches.

    Raises:
        ModuleNotFoundError: without matplotlib, with what to write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lightning_stale.plots draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and nothing of pyplot's to close
    return figure


def bare(axes: Axes) -> None:
    """Leave out of ``axes`` what shows nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
