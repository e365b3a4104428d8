"""The figures of monitoring.md, of the runs of `make quickstart`: ``python -m docs.figures.monitoring``."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_stale import plots

FOLDER = Path(__file__).parent
RUN = "trainer/strategy=dssp"


def main(runs: Path = Path("outputs/quickstart")) -> None:
    """Draw who waited with DSSP, and how stale its gradients were."""
    folder = next(path.parents[1] for path in runs.glob("*/.hydra/overrides.yaml") if RUN in path.read_text())
    summary = json.loads((folder / "results.json").read_text())["summary"]
    plots.waiting(summary).savefig(FOLDER / "waiting.png", dpi=110)
    plots.histograms(summary).savefig(FOLDER / "histograms.png", dpi=110)


if __name__ == "__main__":
    main()
