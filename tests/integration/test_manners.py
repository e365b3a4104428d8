"""What a user meets over processes of a pipeline: predictions, hints, gradient norms, and a Timer by epochs."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter, Timer
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from lightning_stale import DSPStrategy
from tests.integration.harness import run_workers
from tests.integration.models import Regression, loader, trainer


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
        self.written.append(prediction.shape)

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, *_: Any) -> None:
        self.written.append(len(predictions))


class Normed(Regression):
    """Logs the norms of its gradients, as Lightning's documentation does."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self.net, norm_type=2))


class Several(Regression):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(batch[0])


class Unpicklable(Regression):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]), lambda: None


class Staged(Regression):
    def configure_stages(self) -> list[nn.Module]:
        return [self.net[:1], self.net[1:]]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def use_a_pipeline(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(2, "dsp", max_steps=4, log_every_n_steps=1)
        shuffled = loader(shuffle=True, num_workers=1)
        t.fit(Normed(), shuffled)
    said["sampler"] = type(shuffled.batch_sampler.sampler), shuffled.worker_init_fn
    said["warned"] = sum("is that of the last stage alone" in str(warning.message) for warning in caught)
    writer, model = Writer(), Several()
    data = loader(samples=32)
    t = trainer(2, "dsp", callbacks=[writer])
    said["predictions"] = t.predict(model, data)
    said["none"] = t.predict(model, data, return_predictions=False)
    said["several"] = t.predict(model, [data, data])
    said["written"] = writer.written
    said["expected"] = [model.net(batch[0]).detach() for batch in data] if rank == 0 else None
    try:
        trainer(2, "dsp", max_steps=4).fit(Staged(), loader())  # calls self.net, and not self
    except Exception as error:
        said["hint"] = str(error)
    try:
        trainer(2, "dsp").predict(Unpicklable(), data)
    except Exception as error:
        said["unpicklable"] = repr(error)
    return said


def test_what_the_ranks_of_a_pipeline_say(tmp_path: Path) -> None:
    results = run_workers(use_a_pipeline, 2, tmp_path)
    assert results[0]["warned"] > 0
    for result in results:
        assert result["sampler"] == (RandomSampler, None), "the loader is the user's, who may read it on one rank"
        assert all(map(torch.equal, result["predictions"], results[0]["expected"]))
        assert len(result["predictions"]) == 4
        assert result["none"] is None
        assert [len(each) for each in result["several"]] == [4, 4]
        assert all(map(torch.equal, result["several"][1], results[0]["expected"]))
        assert "write self(x) instead of, say, self.net(x)" in result["hint"]
    assert results[0]["written"][:5] == [torch.Size([8, 1])] * 4 + [4]
    assert results[1]["written"] == []
    assert "ickle" in results[0]["unpicklable"]
    assert results[1]["unpicklable"].startswith("RunFailedError")


def fit_with_timer(rank: int, limits: list[int]) -> list[int]:
    epochs = []
    for strategy in ("ssp", "hpsgd", "dsp"):
        timer = Timer(timedelta(seconds=limits[rank]), interval="epoch", verbose=False)
        t = trainer(2, strategy, max_epochs=3, callbacks=[timer])
        t.fit(Regression(), loader(samples=32))
        epochs.append(t.current_epoch)
    return epochs


def test_a_timer_by_epochs_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """Whose clocks differ: the decision is rank 0's."""
    assert run_workers(fit_with_timer, 2, tmp_path / "long", [3600, 0]) == [[3, 3, 3]] * 2


def test_virtual_stages_give_the_same_hint() -> None:
    with pytest.raises(MisconfigurationException, match=r"write self\(x\) instead of, say, self.net\(x\)"):
        trainer(1, DSPStrategy(stages=2), max_steps=4).fit(Staged(), loader())
