"""Show how stale training is."""

from __future__ import annotations

import time
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_stale.parameter_server.apply import Plain
from lightning_stale.strategies.stale_sync import StaleSyncStrategy


class StalenessMonitor(Callback):
    """Log lead, gradient staleness, waiting share and speed of this worker, and print a table of all at the end of fit.

    Logged per step through Lightning's own ``log``, on the rank that the logger belongs to:

    - ``staleness/lead``: clocks ahead of the slowest worker, at the last OK;
    - ``staleness/gradient``: updates between the last pull and the push;
    - ``staleness/wait_share``: part of the time of the last step that was spent waiting, 0..1;
    - ``staleness/samples_per_s``: samples per second of this worker, loading not counted; where Lightning can tell the
      size of a batch;
    - ``staleness/refused``: 1 where the apply rule did not let the push be an update, else 0; with a rule other than
      ``"plain"``, and not in the progress bar;
    - ``staleness/threshold``, or ``staleness/lower`` and ``staleness/upper``, or ``staleness/delay``: the thresholds in
      force, where they adapt as of the last meeting point; not in the progress bar.

    Args:
        prog_bar: show them in the progress bar too.
        print_summary: print the table of ``strategy.summary()`` at the end of ``fit``.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import StalenessMonitor
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="ssp", callbacks=[StalenessMonitor()],
        ...                   logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, prog_bar: bool = True, print_summary: bool = True) -> None:
        self.prog_bar = prog_bar
        self.print_summary = print_summary
        self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to show."""
        if not isinstance(trainer.strategy, StaleSyncStrategy):
            raise MisconfigurationException(
                f"StalenessMonitor shows lead and staleness, and {type(trainer.strategy).__name__} has neither: write "
                "Trainer(strategy='dssp'), or leave the monitor out; trainer.strategy.summary() shows what there is "
                "for HPSGDStrategy"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note when the step began."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the last OK."""
        assert isinstance(trainer.strategy, StaleSyncStrategy)
        release = trainer.strategy.last_release
        if release is None:
            return
        step_s = time.perf_counter() - self._started
        values = {
            "staleness/lead": float(release.lead),
            "staleness/gradient": float(release.staleness),
            "staleness/wait_share": release.wait_s / max(release.wait_s + release.compute_s, 1e-9),
        }
        try:
            values["staleness/samples_per_s"] = extract_batch_size(batch) / max(step_s, 1e-9)
        except MisconfigurationException:  # Lightning cannot tell how large such a batch is
            pass
        pl_module.log_dict(values, on_step=True, on_epoch=False, prog_bar=self.prog_bar, batch_size=1)
        bounds = {f"staleness/{name}": float(value) for name, value in trainer.strategy.paradigm.thresholds.items()}
        refused = {} if type(trainer.strategy.apply) is Plain else {"staleness/refused": float(not release.applied)}
        pl_module.log_dict({**bounds, **refused}, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if self.print_summary and trainer.is_global_zero:
            assert isinstance(trainer.strategy, StaleSyncStrategy)
            Console().print(summary_table(trainer.strategy.summary()))


def summary_table(summary: dict[str, Any]) -> Table:
    """Return ``StaleSyncStrategy.summary()`` as a table that fits 80 columns."""
    rule = summary.get("apply", "Plain()")  # files of earlier runs have none
    name = summary["paradigm"] if rule == "Plain()" else f"{summary['paradigm']}, {rule}"
    table = Table(title=f"{name}: {summary['updates']} updates", box=box.SIMPLE_HEAD)
    refused = ["refused"] if any(worker.get("refused") for worker in summary["workers"]) else []
    share = "share" if refused else "of the time"  # 80 columns
    for heading in ("rank", "pushes", *refused, "lead (max)", "staleness (max)", "waited", share):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in summary["workers"]:
        total_s = max(worker["wait_s"] + worker["compute_s"], 1e-9)
        table.add_row(
            str(worker["rank"]),
            str(worker["pushes"]),
            *(str(worker[name]) for name in refused),
            f"{worker['mean_lead']:.2f} ({worker['max_lead']})",
            f"{worker['mean_staleness']:.2f} ({worker['max_staleness']})",
            f"{worker['wait_s']:.1f} s",
            f"{worker['wait_s'] / total_s:.0%}",
        )
    if len(summary["phases"]) > 1:
        table.caption = "\n".join(
            f"from update {phase['since']}: {', '.join(f'{k}={v}' for k, v in phase['thresholds'].items())}, "
            f"largest lead {phase['max_lead']}"
            for phase in summary["phases"]
        )
    return table
