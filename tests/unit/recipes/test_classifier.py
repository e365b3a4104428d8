"""The classifier learns, logs what it says, and is cut and trained by a pipeline as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_stale import DSPStrategy
from recipes.classifier import ImageClassifier
from recipes.data import CIFAR, Digits
from recipes.models import cifar_resnet, digits_cnn
from tests.integration.models import trainer
from tests.unit.recipes.images import REAL, subset


class Rates(Callback):
    """Notes the learning rate of each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_it_learns_the_digits() -> None:
    torch.manual_seed(1)
    step = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2], gamma=0.5)
    adam = partial(torch.optim.Adam, lr=0.004)
    model = ImageClassifier(model=digits_cnn(), optimizer=adam, scheduler=step, num_classes=10)
    rates = Rates()
    t = trainer(1, "auto", max_epochs=4, callbacks=[rates])
    t.fit(model, Digits(batch_size=32, seed=1))
    assert set(t.callback_metrics) == {"train_loss", "val_loss", "val_accuracy"}
    assert rates.rates == [0.004, 0.004, 0.002, 0.002]
    validation = dict(t.callback_metrics)
    (test,) = t.test(model, Digits(batch_size=32, seed=1), verbose=False)
    assert set(test) == {"test_loss", "test_accuracy"}
    assert test["test_accuracy"] > 0.9
    assert test["test_accuracy"] == pytest.approx(validation["val_accuracy"].item())
    digits = Digits(batch_size=360, seed=1)
    digits.setup("test")
    images, labels = digits._sets[False].tensors
    outputs = model.eval()(images)
    assert test["test_accuracy"] == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
    assert test["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL}, where the real CIFAR lies on some machines, is not here")
def test_a_pipeline_cuts_a_residual_network_and_learns_from_real_images(tmp_path: Path) -> None:
    data = CIFAR(name="cifar10", root=str(subset(tmp_path / "data", "cifar10", train=192, test=64)), batch_size=16)
    torch.manual_seed(0)
    model = ImageClassifier(
        model=cifar_resnet(depth=20), optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9), num_classes=10
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    strategy = DSPStrategy(stages=3)
    t = trainer(1, strategy, max_epochs=5, callbacks=[Losses()])
    t.fit(model, data)
    stages = strategy.summary()["stages"]
    assert strategy.summary()["staleness"] == (4, 2, 0)
    assert sum(stage["parameters"] for stage in stages) == 269_722
    assert max(stage["parameters"] for stage in stages) < 0.5 * 269_722
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(not torch.equal(after[name], before[name]) for name, p in model.named_parameters())
    assert len(losses) == 5 * 12
    assert sum(losses[-12:]) < 0.95 * sum(losses[:12])
    assert 0 <= t.callback_metrics["val_accuracy"] <= 1
