"""Medians of alternating repetitions, as a table in the terminal, a JSON file and a figure."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lightning_stale

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line: what was measured, a value per repetition, and the ratio to the line that it is compared with."""

    name: str
    values: list[float] = field(default_factory=list)
    against: str | None = None
    expected: str = ""
    also: dict[str, str] = field(default_factory=dict)  # further columns

    @property
    def median(self) -> float:
        """The median over the repetitions."""
        return statistics.median(self.values)


def ratio(row: Row, rows: list[Row]) -> float | None:
    """Return the ratio of medians of ``row`` and the row that it is compared with."""
    return None if row.against is None else row.median / next(r for r in rows if r.name == row.against).median


def report(name: str, title: str, unit: str, rows: list[Row]) -> None:
    """Print ``rows``, and write ``results/<name>.json`` and ``results/<name>.png``."""
    table = Table(title=title)
    also = list(dict.fromkeys(column for row in rows for column in row.also))
    for heading in ("", f"median ({unit})", "min", "max", "ratio", *also, "expected"):
        table.add_column(heading, justify="left" if heading in ("", "expected") else "right")
    for row in rows:
        against = ratio(row, rows)
        table.add_row(
            row.name,
            f"{row.median:.3g}",
            f"{min(row.values):.3g}",
            f"{max(row.values):.3g}",
            "" if against is None else f"{against:.2f}",
            *(row.also.get(column, "") for column in also),
            row.expected,
        )
    Console(width=100 + 12 * len(also)).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": title,
        "unit": unit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads by default",
        "versions": {"torch": torch.__version__, "lightning_stale": lightning_stale.__version__},
        "rows": [asdict(row) | {"median": row.median, "ratio": ratio(row, rows)} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    _draw(RESULTS / f"{name}.png", title, unit, rows)


def _draw(path: Path, title: str, unit: str, rows: list[Row]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.35 * len(rows)), layout="constrained")
    medians = [row.median for row in rows]
    low = [row.median - min(row.values) for row in rows]
    high = [max(row.values) - row.median for row in rows]
    axes.barh([row.name for row in rows], medians, xerr=[low, high], color="tab:blue", alpha=0.8)
    axes.invert_yaxis()
    axes.set(xlabel=unit, title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
