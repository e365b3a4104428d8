"""Lightning's callbacks that reach into the model: they do to a model that is cut what they do to a plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_stale import DSPStrategy
from tests.integration.harness import run_workers
from tests.integration.models import assert_equal, assert_same, trainer, weights
from tests.unit.pipeline.networks import Chain, batches

STEPS = 20


class Model(Chain):
    """With a rate to be found, batch norm and dropout."""

    def __init__(self, lr: float = 0.02, dropout: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.net[1].append(nn.BatchNorm1d(8))
        self.net[5].append(nn.BatchNorm1d(6))
        self.net[3].append(nn.Dropout(dropout))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit(world_size: int, strategy: Any, callbacks: list[Callback], model: Model | None = None, **options: Any) -> Any:
    """Train, and return how it ended: everything on rank 0."""
    torch.manual_seed(3)
    model = model or Model()
    ckpt_path, shuffle = options.pop("ckpt_path", None), options.pop("shuffle", True)
    t = trainer(world_size, strategy, callbacks=callbacks, **{"max_epochs": 3, **options})
    t.fit(model, batches(STEPS, shuffle=shuffle), batches(3, seed=5), ckpt_path=ckpt_path)
    return {
        "weights": weights(model),
        "optimizer": t.optimizers[0].state_dict(),
        "metrics": {name: float(value) for name, value in t.callback_metrics.items()},
        "lr": model.lr,
    }


# --- a trial run leaves nothing behind --------------------------------------------------------------------------------


class Once(Callback):
    """Notes what of the model a rank holds while it trains."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.held = {name for name, p in pl_module.named_parameters() if not p.is_meta}
        self.stepped = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)


def finder() -> Callback:
    return LearningRateFinder(min_lr=1e-4, max_lr=0.3, num_training_steps=25)


def find(rank: int, world_size: int, strategies: list[Any], folder: str) -> list[Any]:
    found = []
    for strategy in strategies:
        once = Once()
        options = {"default_root_dir": folder, "shuffle": False}  # Lightning's own trial moves a shuffled order on
        tried = fit(world_size, copy.deepcopy(strategy), [finder(), once], Model(), **options)
        plain = fit(world_size, copy.deepcopy(strategy), [], Model(tried["lr"]), **options)
        model = Model()
        t = trainer(world_size, copy.deepcopy(strategy), max_epochs=3, default_root_dir=folder)
        suggested = Tuner(t).lr_find(model, batches(STEPS, shuffle=True), batches(3, seed=5), num_training=25)
        found.append((tried, plain, once.held, once.stepped, suggested.suggestion(), weights(model)))
    return found


def check_found(found: list[Any], rank: int = 0) -> None:
    for tried, plain, *_, suggested, after in found:
        assert tried["lr"] == plain["lr"] != 0.02, "it has found one"
        if rank == 0:
            assert_same(tried["weights"], plain["weights"])
            assert_equal(tried["optimizer"]["state"], plain["optimizer"]["state"])
            assert_same(after, weights(Model()))
        assert tried["metrics"] == plain["metrics"]
        assert suggested is not None


STALE = {"split": [2, 5], "staleness": (4, 2, 0)}


def test_a_search_for_the_rate_leaves_nothing_behind_on_virtual_stages(tmp_path: Path) -> None:
    strategies = [DSPStrategy(stages=3, **STALE), DSPStrategy(stages=3, **STALE, recompute=False)]
    check_found(find(0, 1, strategies, str(tmp_path)))
    alone = fit(1, "auto", [finder()], default_root_dir=str(tmp_path))
    assert_equal(fit(1, DSPStrategy(stages=3, staleness="bp"), [finder()], default_root_dir=str(tmp_path)), alone)


def average(rank: int, world_size: int, strategy: Any, folder: str) -> list[Any]:
    """EMA and SWA by averaging, with a checkpoint in the middle that is resumed from, and a second fit."""
    found = []
    for number, averaging in enumerate((EMAWeightAveraging(decay=0.9), WeightAveraging(use_buffers=False))):
        path = Path(folder) / f"{number}"
        saving = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        result = fit(world_size, copy.deepcopy(strategy), [averaging, saving], enable_checkpointing=True)
        whole = averaging._average_model
        result["average"] = weights(whole)
        again = type(averaging)(**({"decay": 0.9} if number == 0 else {"use_buffers": False}))
        resumed = fit(world_size, copy.deepcopy(strategy), [again], ckpt_path=path / "epoch=0.ckpt")
        found.append((result, resumed))
    return found


def both(rank: int, world_size: int, folder: str) -> Any:
    """What is compared between two processes and one: virtual stages, and the plain Trainer."""
    found = find(rank, world_size, [DSPStrategy(stages=2, split=[4], staleness=(3, 0))], folder)
    check_found(found, rank)
    return found, average(
        rank, world_size, "auto" if world_size == 1 else DSPStrategy(split=[4], staleness="bp"), folder
    )


def test_over_processes_as_on_virtual_stages(tmp_path: Path) -> None:
    ranks = run_workers(both, 2, tmp_path / "ranks", 2, str(tmp_path / "ranks"), timeout=180.0)
    ((virtual, alone),) = run_workers(both, 1, tmp_path / "alone", 1, str(tmp_path / "alone"), timeout=180.0)
    for mine, theirs in zip(virtual[0][:2], ranks[0][0][0][:2], strict=True):
        assert_equal(theirs, mine)
    assert virtual[0][4] == ranks[0][0][0][4] == ranks[1][0][0][4], "the same suggestion"
    held = [rank[0][0][2] for rank in ranks]
    assert held[0] & held[1] == set(), "each holds its part, after the trial too"
    assert held[0] | held[1] == {name for name, _ in Model().named_parameters()}
    assert [rank[0][0][3] for rank in ranks] == [len(names) for names in held]

    for (mine, resumed), (theirs, theirs_resumed) in zip(alone, ranks[0][1], strict=True):
        assert_equal(theirs, mine)
        assert_equal(theirs_resumed, resumed)
    for number in (0, 1):
        files = [
            torch.load(tmp_path / run / str(number) / "epoch=1.ckpt", weights_only=False) for run in ("ranks", "alone")
        ]
        for entry in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
            assert_equal(files[0][entry], files[1][entry], entry)


# --- on virtual stages, everything ------------------------------------------------------------------------------------

CALLBACKS: list[Any] = [
    lambda: EMAWeightAveraging(decay=0.9),
    lambda: WeightAveraging(use_buffers=False),
    lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    lambda: ModelPruning("l1_unstructured", amount=0.3),
    lambda: ModelPruning("l1_unstructured", amount=0.3, use_global_unstructured=False, parameter_names=["weight"]),
]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_on_virtual_stages_back_propagation_equals_the_plain_trainer(callback: Any, tmp_path: Path) -> None:
    def run(strategy: Any, folder: Path) -> Any:
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        result = fit(1, strategy, [callback(), saving], enable_checkpointing=True)
        return result, torch.load(folder / "epoch=1.ckpt", weights_only=False)["state_dict"]

    plain = run("auto", tmp_path / "plain")
    for recompute in (True, False):
        cut = run(DSPStrategy(stages=3, staleness="bp", recompute=recompute), tmp_path / str(recompute))
        assert_equal(cut[0], plain[0])
        assert_same(cut[1], plain[1])


@pytest.mark.parametrize("recompute", [True, False])
def test_an_epoch_without_a_backward_learns_the_statistics_of_batch_norm(recompute: bool) -> None:
    """The last one of SWA; a stale pipeline would have waited with them for the backward."""
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    model = Model()
    data = batches(STEPS)
    strategy = DSPStrategy(stages=3, **STALE, recompute=recompute)
    trainer(1, strategy, max_epochs=2, callbacks=[averaging]).fit(model, data)
    norm = model.net[1][-1]
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for x, _ in data:
            model.train().net(x)
    means = torch.stack([batch.mean(0) for batch in seen])
    assert int(norm.num_batches_tracked) == 2 * STEPS
    again = nn.BatchNorm1d(8, momentum=None)
    for batch in seen:
        again(batch)
    assert torch.isfinite(means).all()


# --- what cannot work over processes ----------------------------------------------------------------------------------


class Hoarder(Callback):
    """Copies the weights, of which it sees a part, and saves them."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.copies = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"copies": self.copies}


def refuse(rank: int, world_size: int, folder: str) -> list[str]:
    texts = []
    for callback in (StochasticWeightAveraging(swa_lrs=0.01), ModelPruning("l1_unstructured"), Hoarder()):
        saving = ModelCheckpoint(folder)
        try:
            fit(world_size, DSPStrategy(), [callback, saving], enable_checkpointing=True, max_epochs=1)
            texts.append("nothing")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_what_needs_the_whole_model_is_refused_with_the_cure(tmp_path: Path) -> None:
    ranks = run_workers(refuse, 2, tmp_path, 2, str(tmp_path))
    for swa, pruning, _ in ranks:
        assert "StochasticWeightAveraging copies the whole model" in swa
        assert "write lightning.pytorch.callbacks.WeightAveraging()" in swa
        assert "ModelPruning compares all weights" in pruning
        assert "devices=1 (virtual stages)" in pruning
    assert "'callbacks' of the checkpoint holds tensors of the model that are on other ranks" in ranks[0][2]
    assert "rank 0 raised" in ranks[1][2]


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["value", "norm"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_gradients_are_clipped_while_the_pipeline_fills(algorithm: str, precision: str) -> None:
    """The first stages have none yet."""
    seen: list[float] = []

    class Clipped(Chain):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.extend(float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None)

    strategy = DSPStrategy(stages=3, staleness="dsp")
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "precision": precision}
    trainer(1, strategy, max_epochs=1, **options).fit(Clipped(), batches(12))
    assert seen
    assert max(seen) <= 1e-3 * 1.01
