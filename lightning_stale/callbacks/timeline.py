"""A timeline of a fit, which Perfetto shows."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stale.recording.options import free
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.recorded import folder_of_log


class Timeline(Callback):
    """Write what every worker did when, as a file that https://ui.perfetto.dev and ``chrome://tracing`` open.

    With a parameter server: a row per worker: what it computed (which batches, where they are handed out), and what it
    waited for; the staleness of its pushes as a counter. A row of the server: the pushes as they were applied. Arrows
    lead from a worker to its push, and from a push to whoever got its OK for it. It is written on rank 0's host while
    training runs, by the clock of the server; after a crash it is good up to the crash.

    With ``"hpsgd"``: the steps of each worker, and the average that is in flight. With ``"dsp"``: forwards and
    backwards of each stage, what it waits for, how many messages lie in its queues, and arrows from stage to stage.
    Each rank writes a file of its own beside it (``timeline.rank3.json``), by the clock of the coordinator as near as
    the fastest of a few messages tells; when training has ended they are made one, and after a crash they are as they
    are.

    Args:
        path: of the file; ``None``: ``timeline.json`` in the folder of the log. It is never written over: where it
            exists, its name gets a number.
        max_events: how many it has at most, at about 100 bytes each; when it is full, the older half goes.

    Raises:
        ValueError: for fewer than 1000 events.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import Timeline
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="ssp", callbacks=[Timeline("fit.json")],
        ...                   logger=False, enable_checkpointing=False)
    """

    def __init__(self, path: str | Path | None = None, *, max_events: int = 200_000) -> None:
        if isinstance(max_events, bool) or not isinstance(max_events, int) or max_events < 1000:
            raise ValueError(f"max_events={max_events!r}: write a number >= 1000, e.g. max_events=200_000")
        self.path, self.max_events = path, max_events

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the strategy write it."""
        strategy = trainer.strategy
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not isinstance(strategy, StaleStrategy):
            raise MisconfigurationException(
                f"Timeline shows who waits for whom, and {type(strategy).__name__} tells it nothing of that: write "
                "Trainer(strategy='dssp'), or another strategy of lightning_stale, or leave it out; torch.profiler "
                "has a timeline of one process"
            )
        path = folder_of_log(trainer, "Timeline()") / "timeline.json" if self.path is None else Path(self.path)
        if trainer.is_global_zero:
            path = free(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            rank_zero_info(f"The timeline of this fit is written to {path}")
        strategy.trace(Path(strategy.broadcast(str(path))), self.max_events)
