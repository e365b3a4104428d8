"""Writes the tables of the README and of docs/ that are made of ``benchmarks/results``; a test compares.

A table follows the comment ``<!-- results: NAME -->``; NAME is one of ``TABLES``.

    python benchmarks/pages.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"^(<!-- results: (\S+) -->\n\n)(?:\|.*\n)*", re.MULTILINE)
LIMIT, ON_DEMAND = "sum of the workers' own rates", ", on demand"

KINDS = {
    "equal": "equal and fast",
    "se": "jitter in every step",
    "hiccups": "slow now and then",
    "ar": "slow for good",
}
WHICH = {  # strategy: its page, and its row in the results of workers.py and of overlap.py
    "ddp": (None, "ddp", "ddp"),
    "bsp": ("stale-sync.md", "bsp", None),
    "ssp": ("stale-sync.md", "ssp", None),
    "dssp": ("stale-sync.md", "dssp", None),
    "asp": ("stale-sync.md", f"asp{ON_DEMAND}", None),
    "bounded-delay": ("stale-sync.md#data-on-demand-and-bounded-delay", f"bounded-delay{ON_DEMAND}", None),
    "hpsgd": ("hpsgd.md", "hpsgd", "hpsgd"),
    "dsp": ("dsp.md", None, None),
}
PIPELINES = {"equal": "pipeline_equal", "hiccups": "pipeline_stragglers"}
DSP = "DSP, m = 2(K-1-k), no recompute"
_GOES_ON = dict.fromkeys(("bsp", "ssp", "dssp", "asp", "bounded-delay"), "goes on")
DEATHS = {"ddp": "ends", **_GOES_ON, "hpsgd": "starts anew", "dsp": "starts anew"}  # benchmarks/faults.py, test_restart
GAP = "?"


def rows(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a result by their names."""
    return {row["name"]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}


def table(header: list[str], body: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [[f" {cell} ".replace("  ", " ") for cell in cells] for cells in (header, *body)]
    lines.insert(1, ["---"] * len(header))
    return "".join(f"|{'|'.join(cells)}|\n" for cells in lines)


def workers(case: str) -> str:
    """Return a table of workers.py; the best of those who exchange something is bold."""
    found = rows(f"workers_{case}")
    best = max((row["ratio"], name) for name, row in found.items() if row["ratio"] and name != "side by side")[1]
    body = []
    for name, row in found.items():
        share = "1" if name == LIMIT else f"{row['ratio']:.2f}"
        spread = f"{row['median']:.0f} ({min(row['values']):.0f} to {max(row['values']):.0f})"
        also = [row["also"].get(column, "") for column in ("of ddp", "waiting", "staleness (max)")]
        name = re.sub(r"^[\w-]+(?=$|, )", r"`\g<0>`", name)
        body.append([name, spread, f"**{share}**" if row["name"] == best else share, *also])
    return table(["", "samples/s", "of the own rates", "of DDP's", "waiting", "staleness (max)"], body)


def accuracy() -> str:
    """Return the table of accuracy.py."""
    body = []
    for name in rows("accuracy"):
        strategy, _, mean = name.partition(": mean ")
        strategy = re.sub(r"^[\w-]+", r"`\g<0>`", strategy)
        body.append([strategy, f"{float(mean):.1f} %"])
    return table(["", "test accuracy"], body)


def which() -> str:
    """Return which strategy is for what: shares of the speed at which nobody would wait for anything."""
    shares = {case: rows(f"workers_{case}") for case in KINDS}
    network = rows("overlap")
    best = {case: max(shares[case][row]["ratio"] for _, row, _ in WHICH.values() if row) for case in KINDS}
    body = []
    for strategy, (page, row, on_slow_network) in WHICH.items():
        name = f'`"{strategy}"`' if page is None else f'[`"{strategy}"`](docs/{page})'
        cells = [f"{rows(PIPELINES[case])[DSP]['median']:.2f}" if case in PIPELINES else "" for case in KINDS]
        if row is not None:
            ratios = {case: shares[case][row]["ratio"] for case in KINDS}
            cells = [f"**{r:.2f}**" if r > best[case] - 0.02 else f"{r:.2f}" for case, r in ratios.items()]
        slow = f"{1 / network[on_slow_network]['ratio']:.2f}" if on_slow_network else ""
        died = "" if strategy == "dsp" else DEATHS.get(strategy, GAP)
        body.append([name, *cells, died, f"**{slow}**" if strategy == "hpsgd" else slow])
    return table(["workers are", *KINDS.values(), "dying", "on a slow network"], body)


TABLES: dict[str, Callable[[], str]] = {
    "which": which,
    "accuracy": accuracy,
    **{f"workers_{case}": partial(workers, case) for case in ("equal", "unequal", "hiccups", "se", "ar")},
}


def with_results(text: str) -> str:
    """Return a page with its tables as they are to be."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]](), text)


def main() -> None:
    """Write all pages anew."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text()
        if with_results(text) != text:
            page.write_text(with_results(text))
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
