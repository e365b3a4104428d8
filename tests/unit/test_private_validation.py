"""The parts of Lightning's validation and of torchmetrics that are reached into are where they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from torchmetrics import CatMetric, SumMetric

from lightning_stale.private import of_torchmetrics
from lightning_stale.private.of_validation import ValidationLoop
from tests.integration.models import Ledger, numbered, trainer


class BrokenOffError(Exception):
    pass


class Model(Ledger):
    """Raises in the middle of its second validation, once."""

    def __init__(self) -> None:
        super().__init__(8)
        self.metric = SumMetric()
        self.validations = 0
        self.modes: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append(self.training)
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.validations += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(batch[0])
        self.log("sum", self.metric)
        self.log("number", batch[0].float().mean(), on_step=True, on_epoch=False)
        if self.validations == 2 and batch_idx == 1:
            raise BrokenOffError


class Logged(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], Any]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append((dict(metrics), step))


def fit(redo: bool) -> dict[str, Any]:
    model, logger = Model(), Logged()
    if not redo:
        model.on_validation_start = lambda: None  # type: ignore[method-assign]  # so that nothing is broken off
    average = WeightAveraging()
    t = trainer(1, "auto", max_epochs=3, logger=logger, callbacks=[average], enable_progress_bar=True)
    loop, accepted, breaks = ValidationLoop(t), [], []

    def run(plain: Any) -> Any:
        if not redo:
            return plain()
        while True:
            loop.begin()
            try:
                result = plain()
            except BrokenOffError:
                breaks.append(t.global_step)
                loop.break_off()
                loop.load_anew()
            else:
                loop.end()
                return result

    undo = loop.wrap(run, lambda: accepted.append(len(logger.rows)))
    t.fit(model, numbered(range(8)), numbered(range(8)))
    undo()
    val_loop = t.fit_loop.epoch_loop.val_loop
    assert "run" not in vars(val_loop)
    assert "_swap_models" not in vars(average)
    assert len(breaks) == int(redo)
    assert len(accepted) == (3 if redo else 0)
    assert set(model.modes) == {True}
    return {
        "rows": logger.rows,
        "progress": val_loop.batch_progress.state_dict(),
        "weights": model.pages.detach(),
        "metrics": {name: float(value) for name, value in t.callback_metrics.items()},
    }


def test_a_validation_that_is_broken_off_and_begun_anew_leaves_no_trace() -> None:
    anew, plain = fit(redo=True), fit(redo=False)
    assert anew["rows"] == plain["rows"]
    assert anew["progress"] == plain["progress"]
    assert anew["metrics"] == plain["metrics"]
    assert torch.equal(anew["weights"], plain["weights"])


@pytest.mark.parametrize("make", [SumMetric, CatMetric])
def test_a_metric_gathers_through_a_collective_that_may_be_called_again(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric, calls = make(distributed_available_fn=lambda: True, dist_sync_fn=lambda one, group: [one, one]), []

    def twice(gather: Any) -> None:
        calls.append(1)
        gather()
        gather()

    undo = of_torchmetrics.gather_through(twice)
    try:
        metric.update(torch.tensor([1.0, 2.0]))
        value = metric.compute()
    finally:
        undo()
    assert torch.equal(value, torch.tensor(6.0) if make is SumMetric else torch.tensor([1.0, 2.0, 1.0, 2.0]))
    assert calls == [1]
    own = SimpleNamespace()
    undo = of_torchmetrics.gather_through(lambda gather: pytest.fail("a group of its own"))
    try:
        grouped = make(distributed_available_fn=lambda: True, dist_sync_fn=lambda one, group: [one], process_group=own)
        grouped.update(torch.tensor([1.0, 2.0]))
        grouped.compute()
    finally:
        undo()
