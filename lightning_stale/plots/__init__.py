"""Figures of runs, for the screen and for print; they need matplotlib, and nothing else of this package.

Colours are those of Okabe and Ito, which the colour-blind tell apart too; markers and hatches say the same without
colours. Each function returns a matplotlib ``Figure``: ``figure.savefig("waiting.pdf")``.
"""

from __future__ import annotations

from lightning_stale.plots.curves import Curve, Point, accuracy
from lightning_stale.plots.histograms import histograms
from lightning_stale.plots.timeline import Span, read_trace, timeline
from lightning_stale.plots.waiting import waiting

__all__ = ["Curve", "Point", "Span", "accuracy", "histograms", "read_trace", "timeline", "waiting"]
