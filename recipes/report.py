"""What a run prints at its end, within 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from lightning_stale.callbacks.monitor import summary_table


def results_table(metrics: dict[str, float]) -> Table:
    """Return the metrics as a table."""
    table = Table("metric", box=box.SIMPLE_HEAD)
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4f}")
    return table


def strategy_table(summary: dict[str, Any]) -> Table:
    """Return ``trainer.strategy.summary()`` of any strategy of lightning-stale: a row per worker or stage."""
    rows = summary.get("workers") or summary.get("stages") or []
    if rows and "mean_lead" in rows[0]:
        return summary_table(summary)
    table = Table(title=str(summary.get("paradigm") or f"DSP, staleness {summary['staleness']}"), box=box.SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
