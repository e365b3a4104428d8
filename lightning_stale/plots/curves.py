"""Accuracy over time and over samples, of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_stale.plots.style import COLOURS, MARKERS, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_LINE = 100
"""Letters that fit above a figure, the samples of the lines included."""


class Point(NamedTuple):
    """A metric at one time of a run."""

    seconds: float
    samples: float
    """That all workers together have trained until then."""
    value: float


Curve = Sequence[Point]


def accuracy(curves: Mapping[str, Curve], *, metric: str = "validation accuracy (%)", scale: float = 100.0) -> Figure:
    """Draw a metric of several runs over time, and beside it over the samples that all workers have trained.

    Whoever is ahead over time and behind over samples is fast and learns less from each sample.

    Args:
        curves: name of a run -> its points; a run without any is left out.
        metric: the label of the axis, with its unit.
        scale: what values are multiplied by; 100 makes percent of shares.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if there is no point at all.

    Example::

        >>> from lightning_stale.plots import Point, accuracy
        >>> runs = {"ssp": [Point(1.0, 500, 0.5), Point(2.0, 1000, 0.7)], "ddp": [Point(2.0, 500, 0.6)]}
        >>> figure = accuracy(runs)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['time (s)', 'samples of all workers (thousands)']
    """
    drawn = {name: curve for name, curve in curves.items() if curve}
    if not drawn:
        raise ValueError(
            f"curves={dict(curves)!r}: there is no point to draw; write e.g. {{'ssp': [Point(1.0, 500, 0.8)]}}"
        )
    columns = max(1, min(len(drawn), _LINE // (max(map(len, drawn)) + 8)))
    figure = new_figure(9.0, 3.6 + 0.22 * -(-len(drawn) // columns))
    over_time, over_samples = figure.subplots(1, 2, sharey=True)
    most = max(point.samples for curve in drawn.values() for point in curve)
    unit, of = (1e6, "millions") if most >= 1e6 else (1e3, "thousands") if most >= 1e3 else (1.0, "")
    for number, (name, curve) in enumerate(drawn.items()):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],  # an eighth run has the first colour again
        }
        values = [scale * point.value for point in curve]
        over_time.plot([point.seconds for point in curve], values, label=name, linewidth=1.8, markersize=5, **style)
        over_samples.plot([point.samples / unit for point in curve], values, linewidth=1.8, markersize=5, **style)
    over_time.set(xlabel="time (s)", ylabel=metric, xlim=(0, None))
    over_samples.set(xlabel=f"samples of all workers{of and f' ({of})'}", xlim=(0, None))
    for axes in (over_time, over_samples):
        bare(axes)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure
