"""The pipeline over real processes: the trajectory of the virtual stages and of the reference, whatever the speed."""

from __future__ import annotations

import copy
import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from lightning_stale import DSPStrategy
from tests.integration.harness import ROOT, run_script, run_workers
from tests.integration.models import assert_equal, assert_same, trainer, weights
from tests.unit.pipeline.networks import Chain, batches, samples
from tests.unit.pipeline.reference import distance, of_chain

SGD = ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3})
ADAM = ("Adam", {"lr": 0.01})
STEPS = 50


def fit(world_size: int, strategy: dict[str, Any] | str, model: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Train a chain; return its weights under the plain names, as every rank has them in the end."""
    chosen = model.pop("optimizer", SGD)
    chain = Chain(chosen[0], **model, **chosen[1])
    t = trainer(
        world_size,
        DSPStrategy(**strategy, gather="all") if isinstance(strategy, dict) else strategy,
        **{"max_epochs": 1, "limit_val_batches": 2, **options},
    )
    t.fit(chain, batches(STEPS), batches(2, seed=5))
    names = {name: name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") for name in chain.state_dict()}
    found = {names[name]: value for name, value in weights(chain).items()}
    return {
        "weights": found,
        "rates": [group["lr"] for group in t.optimizers[0].param_groups],
        "metrics": {name: float(value) for name, value in t.callback_metrics.items()},
        "optimizer": t.optimizers[0].state_dict(),
    }


def fit_all(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Train one chain after the other in the same processes."""
    return [fit(world_size, strategy, dict(model), **options) for strategy, model, options in cases]


def on_ranks(world_size: int, folder: Path, cases: list[tuple[Any, ...]], **kwargs: Any) -> list[dict[str, Any]]:
    """Return how each case ended on rank 0; all ranks must agree."""
    by_rank = run_workers(fit_all, world_size, folder, world_size, cases, **kwargs)
    for other in by_rank[1:]:
        for mine, theirs in zip(by_rank[0], other, strict=True):
            assert_same(mine["weights"], theirs["weights"])
            assert mine["rates"] == theirs["rates"]
            assert mine["metrics"] == theirs["metrics"]
    return by_rank[0]


def random_case(draw: random.Random, stages: int) -> tuple[Any, ...]:
    lags = [draw.randint(0, 4) for _ in range(stages - 1)]
    m = tuple(sum(lags[k:]) for k in range(stages))
    split = sorted(draw.sample(range(1, 7), stages - 1))
    strategy = {"staleness": m, "split": split, "recompute": draw.random() < 0.5}
    return strategy, {"optimizer": draw.choice([SGD, ADAM])}, {"val_check_interval": draw.choice([17, 1.0])}


def stale_cases(world_size: int) -> list[tuple[Any, ...]]:
    stages = {2: 4, 3: 3, 4: 4}[world_size]  # two virtual stages on each of two ranks
    m, starts = {3: ((4, 2, 0), [2, 5]), 4: ((6, 4, 2, 0), [1, 3, 6])}[stages]
    low = tuple(range(stages - 1, -1, -1))
    draw = random.Random(world_size)
    return [
        ({"staleness": m, "split": starts}, {"optimizer": SGD}, {}),
        ({"staleness": m, "split": starts, "recompute": False}, {"optimizer": ADAM}, {"val_check_interval": 17}),
        ({"staleness": low, "split": starts}, {"optimizer": ADAM}, {"val_check_interval": 17}),
        random_case(draw, stages),
        random_case(draw, stages),
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_trajectory_is_that_of_the_reference_and_of_virtual_stages(world_size: int, tmp_path: Path) -> None:
    cases = stale_cases(world_size)
    delayed = [
        (strategy, {**model, "delay_s": 0.001 * (1 + seed), "seed": seed}, options)
        for seed, (strategy, model, options) in enumerate(cases)
    ]
    real = on_ranks(world_size, tmp_path, delayed)
    for (strategy, model, options), got in zip(cases, real, strict=True):
        virtual = fit(1, {**strategy, "stages": len(strategy["staleness"])}, dict(model), **options)
        assert_same(virtual["weights"], got["weights"])
        assert virtual["metrics"] == got["metrics"]

        name, settings = model["optimizer"]
        chain = Chain(name, **settings)
        reference = of_chain(chain, strategy["split"], strategy["staleness"], recompute=strategy.get("recompute", True))
        data = [tuple(batch) for batch in batches(STEPS)]
        size = int(options.get("val_check_interval", 1.0) * (1 if options.get("val_check_interval") == 17 else STEPS))
        for start in range(0, STEPS, size):
            reference.train(data[start : start + size])  # type: ignore[arg-type]
        chain.load_state_dict({name: got["weights"][plain(name)] for name in chain.state_dict()})
        assert distance(chain, reference) < 1e-6


def plain(name: str) -> str:
    return name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")


@pytest.mark.parametrize("world_size", [2, 3])
def test_back_propagation_equals_the_plain_trainer_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    cases = [
        ({"staleness": "bp"}, {"optimizer": SGD, "schedulers": True}, {"max_epochs": 2, "val_check_interval": 20}),
        ({"staleness": "bp"}, {"optimizer": ADAM, "schedulers": True}, {"accumulate_grad_batches": 3}),
        (
            {"staleness": "bp", "recompute": False},
            {"optimizer": ADAM, "schedulers": True},
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        ),
    ]
    real = on_ranks(world_size, tmp_path, cases)
    for (_, model, options), got in zip(cases, real, strict=True):
        alone = fit(1, "auto", dict(model), **options)
        assert_same(alone["weights"], got["weights"])
        assert alone["rates"] == got["rates"]
        assert alone["metrics"] == got["metrics"]
        assert_equal(alone["optimizer"], got["optimizer"])


# --- metrics, callbacks, loggers --------------------------------------------------------------------------------------


class Measured(Chain):
    """Logs in all ways: plainly, with ``sync_dist``, through a torchmetrics object, at the end of an epoch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = MeanAbsoluteError()
        self.seen: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        output = self.net(x)
        self.error(output, y)
        self.log("val_error", self.error)
        self.log("val_loss", self.loss(output, y), sync_dist=True, on_step=True, on_epoch=True)
        self.seen.append(float(output.sum()))

    def on_validation_epoch_end(self) -> None:
        self.log("val_seen", sum(self.seen))
        self.seen.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_error"}}


def measure(rank: int, world_size: int, strategy: Any, folder: str) -> dict[str, Any]:
    model = Measured()
    data, val = batches(STEPS, shuffle=False), DataLoader(samples(4 * 7 - 1, seed=5), batch_size=4)
    best = ModelCheckpoint(
        Path(folder) / "best", monitor="val_loss_epoch", filename="{epoch}-{val_error:.4f}", save_top_k=2
    )
    stop = EarlyStopping("val_error", patience=2, min_delta=0.01)
    rates = LearningRateMonitor(logging_interval="epoch")
    logger = CSVLogger(folder, name="csv", version=0)
    t = trainer(
        world_size,
        strategy,
        max_epochs=12,
        callbacks=[rates, stop, best],
        logger=logger,
        enable_checkpointing=True,
        num_sanity_val_steps=2,
        log_every_n_steps=5,
    )
    t.fit(model, data, val)
    found: dict[str, Any] = {
        "fit": floats(t.callback_metrics),
        "epochs": t.current_epoch,
        "stopped": stop.stopped_epoch,
        "best": [
            Path(best.best_model_path).name,
            float(best.best_model_score),
            sorted(map(name_of, best.best_k_models)),
        ],
        "rate": t.optimizers[0].param_groups[0]["lr"],
        "weights": weights(model),
    }
    found["validate returns"] = t.validate(model, val, verbose=False)
    found["validate"] = floats(t.callback_metrics)
    found["test returns"] = t.test(model, val, ckpt_path="best", verbose=False)
    found["test"] = floats(t.callback_metrics)
    predicted = t.predict(model, val)
    found["predicted"] = predicted
    return found


def name_of(path: str) -> str:
    return Path(path).name


def floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_metrics_callbacks_and_loggers_see_what_one_process_sees(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("plain", "ranks")}
    (plain_run,) = run_workers(measure, 1, folders["plain"], 1, "auto", str(folders["plain"]))
    ranks = run_workers(measure, 3, folders["ranks"], 3, DSPStrategy(staleness="bp"), str(folders["ranks"]))
    assert 2 < plain_run["epochs"] < 12, "EarlyStopping has ended it"
    assert plain_run["rate"] < 0.1, "ReduceLROnPlateau has acted"
    assert plain_run["best"][2], "checkpoints are there"
    assert_same(plain_run["weights"], ranks[0]["weights"])
    for name in ("fit", "epochs", "stopped", "best", "rate", "validate", "validate returns", "test", "test returns"):
        for rank in ranks:
            assert rank[name] == plain_run[name], name
    assert len(plain_run["predicted"]) == 7
    for rank in ranks:  # rank 0's, on all of them
        assert_equal(rank["predicted"], plain_run["predicted"])
    assert table(folders["ranks"]) == table(folders["plain"])
    assert any(row.get("lr-SGD") for row in table(folders["ranks"]))


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Grouped(Chain):
    """Param groups by name: no decay for biases, another rate for the end of the body; one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        late = [p for name, p in named if name.startswith("net.6")]
        biases = [p for name, p in named if name.endswith("bias") and not name.startswith("net.6")]
        others = [p for name, p in named if not name.endswith("bias") and not name.startswith("net.6")]
        groups = [
            {"params": biases, "weight_decay": 0.0},
            {"params": others},
            {"params": late, "lr": 0.002, "betas": (0.8, 0.99)},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def state_of(t: Any) -> dict[str, Any]:
    """Return what a checkpoint holds of weights and optimizer; on every rank."""
    return {
        "weights": {name: value.clone() for name, value in t.strategy.lightning_module_state_dict().items()},
        "optimizer": copy.deepcopy(t.strategy.optimizer_state(t.optimizers[0])),
        "rates": [group["lr"] for group in t.optimizers[0].param_groups],
    }


class Started(Callback):
    """Notes with which state training begins."""

    state: dict[str, Any]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = state_of(trainer)
        self.in_memory = {name for name, p in pl_module.named_parameters() if not p.is_meta}
        self.stepped = {id(p) for p in trainer.optimizers[0].state}
        self.of = {id(p): name for name, p in pl_module.named_parameters()}


def save(rank: int, world_size: int, strategy: Any, folder: str) -> dict[str, Any]:
    """fit, test(ckpt_path="best") and fit again, with the same Trainer and module."""
    model = Grouped()
    before = [id(p) for p in model.parameters()]
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    best = ModelCheckpoint(Path(folder) / "best", monitor="val_loss", filename="best")
    t = trainer(world_size, strategy, max_epochs=2, callbacks=[best, keep], enable_checkpointing=True)
    data, val = batches(20), batches(3, seed=5)
    t.fit(model, data, val)
    found = {"two": weights(model), "optimizer two": copy.deepcopy(t.optimizers[0].state_dict())}
    found["forward"] = model.net(torch.ones(1, 6)).detach() if rank == 0 else None
    found["same objects"] = [id(p) for p in model.parameters()] == before
    found["best"] = best.best_model_path.removeprefix(folder)
    found["tested"] = t.test(model, val, ckpt_path="best", verbose=False)
    found["after test"] = weights(model)
    t.fit_loop.max_epochs = 4
    t.fit(model, data, val)
    found["four"], found["optimizer four"] = weights(model), t.optimizers[0].state_dict()
    return found


def resume(rank: int, world_size: int, path: str, strategies: list[Any]) -> list[dict[str, Any]]:
    """Resume from a checkpoint under one strategy after the other, and train one more epoch."""
    found = []
    for strategy in strategies:
        started, model = Started(), Grouped()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        t = trainer(world_size, strategy, max_epochs=3, callbacks=[started])
        t.fit(model, batches(20), ckpt_path=path)
        stepped = {started.of[parameter] for parameter in started.stepped}
        found.append({**started.state, "in memory": started.in_memory, "stepped": stepped, "three": weights(model)})
    return found


def test_a_checkpoint_is_an_ordinary_one_and_resumes_anywhere(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("plain", "ranks")}
    (alone,) = run_workers(save, 1, folders["plain"], 1, "auto", str(folders["plain"]))
    ranks = run_workers(save, 3, folders["ranks"], 3, DSPStrategy(staleness="bp"), str(folders["ranks"]))
    assert_equal(ranks[0], alone)
    for rank in ranks[1:]:
        assert (rank["best"], rank["tested"]) == (alone["best"], alone["tested"])
        for entry in ("two", "after test", "four"):
            held = {name: value for name, value in rank[entry].items() if not value.is_meta}
            assert 0 < len(held) < len(alone[entry]), "its part"
            assert_same(held, {name: alone[entry][name] for name in held})
    assert not torch.equal(alone["two"]["scale"], alone["four"]["scale"])

    files = [torch.load(folder / "epoch=1.ckpt", weights_only=False) for folder in folders.values()]
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "hyper_parameters"):
        assert_equal(files[1][entry], files[0][entry], entry)
    loaded = Grouped.load_from_checkpoint(folders["ranks"] / "epoch=1.ckpt")
    assert_same(weights(loaded), alone["two"])

    path = str(folders["ranks"] / "epoch=1.ckpt")
    one = run_workers(resume, 1, tmp_path / "one", 1, path, ["auto", DSPStrategy(stages=4), DSPStrategy(stages=1)])
    virtual = {"stages": 2, "staleness": (3, 0)}
    two = run_workers(resume, 2, tmp_path / "two", 2, path, [DSPStrategy(staleness=(3, 0)), "ddp"])
    one.append(run_workers(resume, 1, tmp_path / "again", 1, path, [DSPStrategy(**virtual)])[0])
    for run in (*one[0], *two[0], two[1][1], *one[1]):
        assert_equal(run["weights"], alone["two"])
        assert_equal(run["optimizer"], alone["optimizer two"])
        assert run["rates"] == [0.0025, 0.0025, 0.0005], "two of StepLR's steps"
    elsewhere = two[1][0]
    assert elsewhere["weights"].keys() == alone["two"].keys()
    assert {name for name, value in elsewhere["weights"].items() if not value.is_meta} == elsewhere["in memory"]
    assert elsewhere["optimizer"] == {}
    assert_same(one[0][0]["three"], one[0][2]["three"])
    assert_same(two[0][0]["three"], one[1][0]["three"])
    names = set(alone["two"])
    assert two[0][0]["in memory"] | two[1][0]["in memory"] == names
    assert two[0][0]["in memory"] & two[1][0]["in memory"] == set()
    for rank in two:
        assert rank[0]["stepped"] == {name for name in rank[0]["in memory"] if not name.startswith("net.2")}


def save_by_step(rank: int, world_size: int, strategy: Any, folder: str) -> Any:
    class ByStep(Chain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(self.net(batch[0]), batch[1])
            self.log("step_loss", loss)
            return loss

    best = ModelCheckpoint(folder, monitor="step_loss", every_n_train_steps=5, save_top_k=2)
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    t = trainer(world_size, strategy, max_epochs=1, callbacks=[best, every], enable_checkpointing=True)
    t.fit(ByStep(), batches(20))
    kept = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    scale = float(t.lightning_module.scale) if rank == 0 else None  # the last stage's
    return kept, sorted(path.name for path in Path(folder).glob("step=*")), scale


def test_checkpoints_chosen_by_a_metric_of_the_step(tmp_path: Path) -> None:
    """Only the last stage has measured it, and all must choose alike; no gradient may wait in a queue."""
    folders = {name: tmp_path / name for name in ("virtual", "ranks")}
    run = {"staleness": (2, 1, 0)}
    (alone,) = run_workers(save_by_step, 1, folders["virtual"], 1, DSPStrategy(**run), str(folders["virtual"]))
    ranks = run_workers(save_by_step, 3, folders["ranks"], 3, DSPStrategy(**run), str(folders["ranks"]))
    assert len(alone[0]) == 2
    assert alone[1] == ["step=14.ckpt", "step=7.ckpt"]
    assert ranks == [alone, (*alone[:2], None), (*alone[:2], None)]


SCRIPT = """
import torch
import lightning_stale
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches

model, best = Chain(), ModelCheckpoint("kept", monitor="val_loss", filename="best")
t = trainer(2, "dsp", max_epochs=2, callbacks=[best], enable_checkpointing=True)
t.fit(model, batches(20), batches(2, seed=5))
(tested,) = t.test(model, batches(2, seed=5), ckpt_path="best", verbose=False)
same = tested["test_loss"] == float(best.best_model_score) > 0
t.fit_loop.max_epochs = 3
t.fit(model, batches(20), batches(2, seed=5))
held = [p for p in model.parameters() if not p.is_meta]
finite = all(p.isfinite().all() for p in held) and (len(held) < 15 if t.global_rank else len(held) == 15)
print(f"rank {t.global_rank}: {finite}, {same}, {t.current_epoch}")
print(f"from {lightning_stale.__file__}")
"""


def test_one_script_fits_tests_and_fits_again_under_lightnings_own_launcher(tmp_path: Path) -> None:
    ended = run_script(SCRIPT, tmp_path)
    assert ended.returncode == 0, ended.output
    for rank in range(2):
        assert f"rank {rank}: True, True, 3" in ended.output
    assert f"from {ROOT / 'lightning_stale'}" in ended.output
