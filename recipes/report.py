"""What a run prints at its end, within 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table


def results_table(metrics: dict[str, float]) -> Table:
    """Return the metrics as a table."""
    table = Table("metric", box=box.SIMPLE_HEAD)
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4f}")
    return table
