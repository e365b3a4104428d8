"""Compare the runs of a multirun: a table, and accuracy over time and over samples as a figure.

A run is named by the overrides in which it differs from the others.

python recipes/train.py -m experiment=digits trainer/strategy=ddp,ssp,dssp,bounded-delay
python recipes/compare.py outputs/DAY/TIME [--figure FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_stale.plots import Point, accuracy

_MAX_KEYS = 4


@dataclass
class Run:
    """What a run has left in its folder."""

    overrides: dict[str, str]
    results: dict[str, Any] | None
    curve: list[Point]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a folder; one of a failed run has no results."""
        overrides = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        results, curve = folder / "results.json", folder / "curve.json"
        return cls(
            {key: value for key, _, value in (override.partition("=") for override in overrides)},
            json.loads(results.read_text()) if results.exists() else None,
            [Point(*point) for point in json.loads(curve.read_text())] if curve.exists() else [],
        )


def load_runs(folder: Path) -> dict[str, Run]:
    """Return the runs below ``folder`` under names that say in what they differ."""
    folders = [path.parent for path in folder.glob("**/.hydra")]
    if not folders:
        raise SystemExit(f"{folder} has no runs: name the folder of a multirun, e.g. outputs/2026-01-31/12-00-00")
    folders = sorted(folders, key=lambda path: (path.parent, len(path.name), path.name))
    runs = [Run.load(path) for path in folders]
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    varied = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    if len(varied) > _MAX_KEYS:  # not one sweep: the folders say which is which
        return {f"{path.parent.name}/{path.name}": run for path, run in zip(folders, runs, strict=True)}
    names = [", ".join(_label(key, run.overrides[key]) for key in varied if key in run.overrides) for run in runs]
    again = [f"{name} ({path.parent.name}/{path.name})".strip() for name, path in zip(names, folders, strict=True)]
    return {
        long if names.count(name) > 1 else name or "run": run
        for name, long, run in zip(names, again, runs, strict=True)
    }


def _label(key: str, value: str) -> str:
    return value if key == "trainer/strategy" else f"{key.rpartition('.')[2]}={value}"


def make_table(runs: dict[str, Run]) -> Table:
    """Return the comparison; leads and staleness are means over the workers, and the largest lead."""
    rows = [(name, *_cells(run)) for name, run in runs.items()]
    table = Table(box=box.SIMPLE_HEAD)
    headings = ("run", "time", "waiting", "lead (max)", "staleness", "validation", "test")
    shown = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    for place in shown:
        width = 0 if place else min(28, max(len(row[0]) for row in rows))
        table.add_column(headings[place], justify="right" if place else "left", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _cells(run: Run) -> tuple[str, ...]:
    """Return what follows the name in a row; empty where the strategy does not count it."""
    if run.results is None:
        return ("failed", "", "", "", "", "")
    metrics = run.results["metrics"]
    time_s = run.curve[-1].seconds if run.curve else run.results["seconds"]
    accuracies = (_percent(metrics.get(name)) for name in ("val_accuracy", "test_accuracy"))
    return (f"{time_s:.1f} s", *_waiting(run.results["summary"]), *accuracies)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _waiting(summary: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return waiting share, lead and staleness, as far as the strategy counts them."""
    workers = (summary or {}).get("workers") or []
    if not workers:
        return "", "", ""
    wait_s, compute_s = (sum(worker[key] for worker in workers) for key in ("wait_s", "compute_s"))
    waiting = f"{wait_s / max(wait_s + compute_s, 1e-9):.0%}"
    if "mean_lead" not in workers[0]:
        return waiting, "", ""
    lead, staleness = (sum(worker[key] for worker in workers) / len(workers) for key in ("mean_lead", "mean_staleness"))
    return waiting, f"{lead:.1f} ({max(worker['max_lead'] for worker in workers)})", f"{staleness:.1f}"


def main() -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a multirun")
    parser.add_argument("--figure", type=Path, help="by default compare.png in that folder")
    arguments = parser.parse_args()
    runs = load_runs(arguments.folder)
    figure = arguments.figure or arguments.folder / "compare.png"
    console = Console()
    console.print(make_table(runs))
    curves = {name: run.curve for name, run in runs.items() if run.curve}
    if curves:
        accuracy(curves).savefig(figure, dpi=160)
        console.print(f"Accuracy over time and over samples: {figure}", soft_wrap=True)


if __name__ == "__main__":
    main()
