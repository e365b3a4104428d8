"""Models built on the meta device: their values come from the user's hook or a checkpoint, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_stale import DSPStrategy
from tests.integration.harness import run_workers
from tests.integration.models import assert_equal, assert_same, trainer, weights
from tests.unit.pipeline.networks import batches


class Bare(L.LightningModule):
    """Initialized by its constructor as ResNets are, which on the meta device does nothing."""

    def __init__(self, device: str = "meta", table: bool = False) -> None:
        super().__init__()
        with torch.device(device):
            self.net = nn.Sequential(
                nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
            )
            if table:
                self.register_buffer("table", torch.ones(3), persistent=False)
        if device != "meta":
            self.initialize()

    def initialize(self) -> None:
        torch.manual_seed(5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(module.bias, 0.25)
            if isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=False)


class Hooked(Bare):
    def init_weights(self) -> None:
        self.initialize()


class Half(Bare):
    def init_weights(self) -> None:
        self.net[0].reset_parameters()


def attempt(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def meta(rank: int, world_size: int, stages: int | None, folder: str) -> dict[str, Any]:
    def train(model: Bare, epochs: int = 1, **options: Any) -> tuple[dict[str, Tensor], Any]:
        t = trainer(world_size, DSPStrategy(stages=stages, staleness="bp"), max_epochs=epochs)
        t.fit(model, batches(6), **options)
        return weights(model), t

    found: dict[str, Any] = {"hook": None}
    found["hook"], t = train(Hooked())
    path = Path(folder) / "hooked.ckpt"
    t.save_checkpoint(path)
    found["loaded"], _ = train(Bare(), epochs=2, ckpt_path=path)
    found["loaded beside a hook"], _ = train(Hooked(), epochs=2, ckpt_path=path)
    t = trainer(world_size, DSPStrategy(stages=stages))
    (found["validated"],) = t.validate(Bare(), batches(6), ckpt_path=path, verbose=False)
    found["refused"] = [
        attempt(lambda: train(Bare())),
        attempt(lambda: train(Bare(table=True), epochs=2, ckpt_path=path)),
        attempt(lambda: train(Half())),
    ]
    return found


def alone(rank: int, folder: str) -> dict[str, Any]:
    def train(epochs: int, **options: Any) -> dict[str, Tensor]:
        model = Bare("cpu")
        t = trainer(1, "auto", max_epochs=epochs)
        t.fit(model, batches(6), **options)
        t.save_checkpoint(Path(folder) / "plain.ckpt")
        return weights(model)

    found: dict[str, Any] = {"hook": train(1)}
    t = trainer(1, "auto")
    (found["validated"],) = t.validate(Bare("cpu"), batches(6), str(Path(folder) / "plain.ckpt"), verbose=False)
    return found | {"loaded": train(2, ckpt_path=Path(folder) / "plain.ckpt")}


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_come_from_the_hook_or_a_checkpoint_or_the_model_is_refused(world_size: int, tmp_path: Path) -> None:
    (plain,) = run_workers(alone, 1, tmp_path / "plain", str(tmp_path / "plain"))
    ranks = run_workers(meta, world_size, tmp_path / "meta", world_size, 2, str(tmp_path / "meta"))
    assert_same(ranks[0]["hook"], plain["hook"])
    for name in ("loaded", "loaded beside a hook"):
        assert_same(ranks[0][name], plain["loaded"])
    for rank in ranks:
        assert_equal(rank["validated"], plain["validated"])
        nothing, table, half = rank["refused"]
        for name, text in (("net.0.weight", nothing), ("table", table)):
            assert f"'{name}' is on the meta device and has no value" in text
            assert "define init_weights() in the LightningModule" in text
            assert "ckpt_path=" in text
        assert "init_weights() has left 'net.1.weight' without a value" in half
    std = float(plain["hook"]["net.3.weight"].std())
    assert std > 0.15, "kaiming's, and not that of reset_parameters(), 0.07"
