"""How far ahead workers were, and how stale their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_stale.plots.style import BLUE, ORANGE, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EACH_BAR = 40
"""Up to so many values have a bar each."""


def histograms(summary: Mapping[str, Any]) -> Figure:
    """Draw how often each lead and each staleness came, of all workers, with a line at the mean.

    Args:
        summary: ``trainer.strategy.summary()`` of a ``StaleSyncStrategy``, or ``"summary"`` of a ``staleness.json``.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if leads and staleness are not counted in it.

    Example::

        >>> from lightning_stale.plots import histograms
        >>> figure = histograms({"workers": [{"leads": {0: 3, 1: 1}, "staleness": {0: 1, 3: 3}}]})
        >>> [round(bar.get_height()) for bar in figure.axes[0].patches]
        [75, 25]
    """
    workers = summary.get("workers") or []
    leads, staleness = (_sum([worker.get(name, {}) for worker in workers]) for name in ("leads", "staleness"))
    if not leads and not staleness:
        raise ValueError(
            f"summary with {', '.join(map(repr, summary))} counts no leads and no staleness: draw that of a fit with "
            "StaleSyncStrategy ('bsp', 'asp', 'ssp', 'dssp' or 'bounded-delay')"
        )
    figure = new_figure(8.0, 3.2)
    left, right = figure.subplots(1, 2)
    _draw(left, leads, "lead at the OK (clocks)", BLUE, "")
    _draw(right, staleness, "staleness of the gradient (updates)", ORANGE, "///")
    left.set_ylabel("share of pushes (%)")
    return figure


def _sum(several: list[Mapping[Any, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for counts in several:
        for value, times in counts.items():  # JSON has strings as keys
            total[int(value)] = total.get(int(value), 0) + times
    return dict(sorted(total.items()))


def _draw(axes: Axes, counts: Mapping[int, int], label: str, colour: str, hatch: str) -> None:
    pushes = sum(counts.values())
    bare(axes)
    axes.set_xlabel(label)
    if not pushes:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
        return
    largest = max(counts)
    bins = 1  # values to a bar; a power of two, as those are that are counted together
    while bins * _EACH_BAR <= largest:
        bins *= 2
    bars: dict[int, int] = {}
    for value, times in counts.items():
        bars[value // bins] = bars.get(value // bins, 0) + times
    middles = [bins * bar + (bins - 1) / 2 for bar in bars]
    shares = [100 * times / pushes for times in bars.values()]
    axes.bar(middles, shares, width=0.85 * bins, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
    mean = sum(value * times for value, times in counts.items()) / pushes
    axes.axvline(mean, color="black", linestyle="--", linewidth=1.2, label=f"mean {mean:.1f}, largest {largest}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    axes.set_xlim(-0.75 * bins, max(largest, 3) + 0.75 * bins)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", alpha=0.3)
