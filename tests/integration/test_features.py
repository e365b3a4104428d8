"""What Lightning users have works: with one worker as in the plain Trainer, bit for bit; with several, on all ranks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_stale import SSP, HPSGDStrategy, StalenessMonitor, StaleSyncStrategy
from tests.integration.harness import run_script, run_workers
from tests.integration.models import Regression, assert_equal, assert_same, loader, regression_data, trainer, weights

BATCHES = 11  # per epoch, so that accumulation over 3 has a rest
EPOCHS = 3


# --- one worker: bit for bit ------------------------------------------------------------------------------------------


class Scheduled(Regression):
    """Regression with a learning-rate scheduler."""

    def __init__(self, scheduler: Callable[[Any], Any], **config: Any) -> None:
        super().__init__("Adam", lr=0.02)
        self.scheduler, self.config = scheduler, config

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), **self.config}}


class Gan(L.LightningModule):
    """Manual optimization, two toggled optimizers: one steps by closure, the other accumulates, clips and schedules."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.generator = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
            self.critic = nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, real = batch
        generate, criticize = self.optimizers()

        def fool() -> Tensor:
            generate.zero_grad()
            loss = nn.functional.softplus(-self.critic(self.generator(x))).mean()
            self.manual_backward(loss)
            return loss

        self.toggle_optimizer(generate)
        self.log("fool", generate.step(fool))
        self.untoggle_optimizer(generate)

        self.toggle_optimizer(criticize)
        fake = self.generator(x).detach()
        loss = nn.functional.softplus(-self.critic(real)).mean() + nn.functional.softplus(self.critic(fake)).mean()
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(criticize, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            criticize.step()
            criticize.zero_grad()
            self.lr_schedulers().step()
        self.untoggle_optimizer(criticize)

    def configure_optimizers(self) -> Any:
        generate = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        criticize = torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.5)
        return [generate, criticize], [lr_scheduler.ExponentialLR(criticize, 0.9)]


class Awkward(Regression):
    """Tied, frozen, later unfrozen, unused and never optimized parameters; param groups, batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.net = nn.Sequential(
                nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
            )
            self.frozen, self.thawed, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.net[3].weight = self.net[0].weight
        self.not_optimized = nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)
        self.thawed.requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(self.thawed(self.frozen(x))) * self.not_optimized, y)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == BATCHES + 4:
            self.thawed.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        others = [*self.frozen.parameters(), *self.thawed.parameters(), *self.unused.parameters()]
        groups = [{"params": self.net.parameters()}, {"params": others, "lr": 0.01, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


class Overflowing(Regression):
    """The loss of one batch is infinite."""

    def loss(self, batch: Any) -> Tensor:
        overflows = self.trainer.training and self.trainer.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 2
        return super().loss(batch) * (float("inf") if overflows else 1.0)


class Silent(Regression):
    """Logs nothing: torch 2.13 cannot compile Lightning's ``log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


Recipe = tuple[L.LightningModule, dict[str, Any]]


def accumulation_with_clipping_by_norm() -> Recipe:
    return Regression("SGD", lr=0.1, momentum=0.9), {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2}


def clipping_by_value_and_max_steps() -> Recipe:
    return Regression("Adam"), {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value", "max_steps": 25}


def scheduler_per_step() -> Recipe:  # cycles the betas as well as the learning rate
    steps = BATCHES * EPOCHS
    return Scheduled(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=steps), interval="step"), {}


def scheduler_per_epoch() -> Recipe:
    return Scheduled(lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.3), interval="epoch"), {}


def scheduler_on_plateau() -> Recipe:
    def plateau(optimizer: Any) -> Any:  # nothing is good enough: reduces after each validation
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e3, threshold_mode="abs")

    return Scheduled(plateau, monitor="val_loss"), {}


def manual_optimization() -> Recipe:
    return Gan(), {}


def awkward_parameters() -> Recipe:
    return Awkward(), {}


def bf16_mixed() -> Recipe:
    return Regression("Adam", lr=0.01), {"precision": "bf16-mixed", "gradient_clip_val": 0.5}


def fp16_mixed_with_overflow() -> Recipe:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    return Overflowing("SGD", lr=0.05, momentum=0.9), {"plugins": plugin, "gradient_clip_val": 0.5}


def double_precision() -> Recipe:
    return Regression("Adam", lr=0.01), {"precision": "64-true"}


def compiled_submodule() -> Recipe:
    model = Regression("Adam", lr=0.01)
    model.net = torch.compile(model.net, backend="aot_eager")
    return model, {"num_sanity_val_steps": 2}


def compiled_lightning_module() -> Recipe:
    return torch.compile(Silent("Adam", lr=0.01), backend="eager"), {}


RECIPES = [
    accumulation_with_clipping_by_norm,
    clipping_by_value_and_max_steps,
    scheduler_per_step,
    scheduler_per_epoch,
    scheduler_on_plateau,
    manual_optimization,
    awkward_parameters,
    bf16_mixed,
    fp16_mixed_with_overflow,
    double_precision,
    compiled_submodule,
    compiled_lightning_module,
]


def fit_recipe(rank: int, recipe: Callable[[], Recipe], strategies: list[Any]) -> list[dict[str, Any]]:
    results = []
    for strategy in strategies:
        L.seed_everything(1)
        model, options = recipe()
        start = weights(model)
        t = trainer(1, strategy, use_distributed_sampler=False, **{"max_epochs": EPOCHS, **options})
        t.fit(model, loader(samples=8 * BATCHES), loader(samples=32, seed=1))
        results.append(
            {
                "start": start,
                "weights": weights(model),
                "optimizers": [optimizer.state_dict() for optimizer in t.optimizers],
                "metrics": {**t.callback_metrics},
                "steps": t.global_step,
                "summary": t.strategy.summary() if strategy != "auto" else None,
            }
        )
    return results


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_one_worker_equals_the_plain_trainer(recipe: Callable[[], Recipe], tmp_path: Path) -> None:
    strategies = ["auto", "bsp", StaleSyncStrategy(paradigm="dssp", transport="tcp")]
    (results,) = run_workers(fit_recipe, 1, tmp_path, recipe, strategies)
    plain = results[0]
    assert any(not torch.equal(plain["start"][name], value) for name, value in plain["weights"].items())
    for stale in results[1:]:
        assert_same(plain["weights"], stale["weights"])
        assert_equal(plain["optimizers"], stale["optimizers"])
        assert_equal(plain["metrics"], stale["metrics"])
        assert stale["steps"] == plain["steps"]
        skipped = 1 if recipe is fp16_mixed_with_overflow else 0
        assert stale["summary"]["workers"][0]["pushes"] == stale["summary"]["updates"] == plain["steps"] - skipped


# --- several workers: as DDP ------------------------------------------------------------------------------------------


class Alternating(Regression):
    """Each rank leaves some parameters without a gradient: always, in some batches, and of other layers."""

    def __init__(self) -> None:
        super().__init__("AdamW", lr=0.01, weight_decay=0.1)
        with torch.random.fork_rng():
            torch.manual_seed(13)
            self.branches = nn.ModuleList(nn.Linear(8, 1) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        used = {self.global_rank, 2} if batch_idx % 2 else {self.global_rank}  # rank 0, rank 1, both, nobody
        return self.loss(batch) + sum(nn.functional.mse_loss(self.branches[branch](x), y) for branch in used)


DDP = "ddp_find_unused_parameters_true"
SEVERAL = [
    (accumulation_with_clipping_by_norm, 1e-6),
    (scheduler_on_plateau, 1e-5),
    (manual_optimization, 1e-5),
    (lambda: (Alternating(), {}), 1e-5),
]


def fit_several(rank: int, place: int, strategies: list[Any]) -> list[dict[str, Tensor]]:
    results = []
    for strategy in strategies:
        model, options = SEVERAL[place][0]()
        t = trainer(2, strategy, **{"max_epochs": EPOCHS, **options})
        t.fit(model, loader(samples=2 * 8 * BATCHES), loader(samples=32, seed=1))
        results.append(weights(model))
    return results


@pytest.mark.parametrize("place", range(len(SEVERAL)), ids=["accumulation", "plateau", "manual", "unused"])
def test_bsp_with_two_workers_equals_ddp(place: int, tmp_path: Path) -> None:
    for ddp, bsp in run_workers(fit_several, 2, tmp_path, place, [DDP, "bsp"]):
        assert_same(ddp, bsp, atol=SEVERAL[place][1])


# --- batch norm -------------------------------------------------------------------------------------------------------


class Statistics(L.Callback):
    """Notes the running mean that a rank comes with to a meeting point, and the one that it goes on with."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.at_validation: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == trainer.num_training_batches - 1:
            self.before.append(pl_module.net[1].running_mean.clone())

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.at_validation.append(pl_module.net[1].running_mean.clone())


def fit_batch_norm(rank: int, strategy: str, folder: Path) -> dict[str, Any]:
    statistics, model = Statistics(), Awkward()
    checkpoint = ModelCheckpoint(folder, save_last=True)
    t = trainer(2, strategy, max_epochs=2, callbacks=[statistics, checkpoint], enable_checkpointing=True)
    t.fit(model, loader(samples=2 * 8 * BATCHES), loader(samples=32))
    return {"before": statistics.before, "at_validation": statistics.at_validation, "weights": weights(model)}


@pytest.mark.parametrize("strategy", ["ssp", "hpsgd"])
def test_running_statistics_are_averaged_before_validation_and_checkpoints(strategy: str, tmp_path: Path) -> None:
    first, second = run_workers(fit_batch_norm, 2, tmp_path, strategy, tmp_path)
    for epoch in range(2):
        assert not torch.equal(first["before"][epoch], second["before"][epoch])
        mean = (first["before"][epoch] + second["before"][epoch]) / 2
        torch.testing.assert_close(first["at_validation"][epoch], mean)
        assert torch.equal(first["at_validation"][epoch], second["at_validation"][epoch])
    assert_same(first["weights"], second["weights"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert_same(saved, first["weights"])
    assert torch.equal(saved["net.1.running_mean"], first["at_validation"][-1])


# --- callbacks, loggers, metrics, and what comes after fit ------------------------------------------------------------

MONITORED = {f"staleness/{name}" for name in ("lead", "gradient", "wait_share", "samples_per_s")}
OF_SSP = {"staleness/threshold"}


class Metered(Regression):
    """Regression with torchmetrics objects, which asks for the summary while it trains."""

    def __init__(self) -> None:
        super().__init__("Adam", lr=0.02)
        self.train_error, self.val_error = torchmetrics.MeanSquaredError(), torchmetrics.MeanSquaredError()
        self.summaries: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self.trainer.strategy, StaleSyncStrategy):
            self.summaries.append(self.trainer.strategy.summary())
        self.train_error(self.net(batch[0]), batch[1])
        self.log("train_error", self.train_error, on_step=False, on_epoch=True)
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_error(self.net(batch[0]), batch[1])
        self.log("val_error", self.val_error, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_error", self.loss(batch), sync_dist=True)


def live(rank: int, world_size: int, strategies: list[Any], folder: Path) -> list[dict[str, Any]]:
    return [lead_a_life(world_size, strategy, folder / str(place)) for place, strategy in enumerate(strategies)]


def lead_a_life(world_size: int, strategy: Any, folder: Path) -> dict[str, Any]:
    """Fit with what a project has, validate, test and predict, and fit again."""
    top = ModelCheckpoint(folder / "top", monitor="val_error", save_top_k=2, filename="{epoch}-{step}")
    stale = strategy != "auto" and not isinstance(strategy, HPSGDStrategy)
    callbacks = [top, EarlyStopping("val_error", min_delta=0.05, patience=1), RichProgressBar()]
    t = trainer(
        world_size,
        strategy,
        max_epochs=6,
        callbacks=[*callbacks, StalenessMonitor()] if stale else callbacks,
        logger=[CSVLogger(folder, name="csv", version=0), TensorBoardLogger(folder, name="board", version=0)],
        enable_checkpointing=True,
        enable_progress_bar=True,
        num_sanity_val_steps=2,
        limit_train_batches=8,
        limit_val_batches=3,
        val_check_interval=0.5,
        log_every_n_steps=2,
        use_distributed_sampler=world_size > 1,
    )
    model = Metered()
    data = loader(samples=8 * 9 * world_size), loader(samples=8 * 4 * world_size, seed=1)
    t.fit(model, *data)
    result = {
        "epochs": t.current_epoch,
        "steps": t.global_step,
        "best": {Path(path).name: float(score) for path, score in top.best_k_models.items()},
        "files": sorted(path.name for path in (folder / "top").glob("*.ckpt")),
        "metrics": {name: value for name, value in t.callback_metrics.items() if "staleness/" not in name},
        "weights": weights(model),
        "summary": t.strategy.summary() if strategy != "auto" else {},
        "validated": t.validate(model, data[1], verbose=False),
        "tested": t.test(model, data[1], ckpt_path=top.best_model_path, verbose=False),
        "predicted": torch.cat(t.predict(model, loader(samples=24, seed=2), ckpt_path=top.best_model_path)),
    }
    t.fit_loop.max_epochs = result["epochs"] + 1
    t.should_stop = False
    t.fit(model, *data)
    return {
        **result,
        "second fit": weights(model),
        "second steps": t.global_step,
        "second summary": t.strategy.summary() if strategy != "auto" else {},
        "summaries": model.summaries,
    }


def logged(folder: Path) -> list[dict[str, float]]:
    """Return the rows of the CSV logger, without its gaps."""
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_callbacks_loggers_and_what_follows_fit_equal_the_plain_trainer(tmp_path: Path) -> None:
    ((plain, stale),) = run_workers(live, 1, tmp_path, 1, ["auto", "dssp"], tmp_path)
    for name in plain.keys() - {"summary", "second summary", "summaries"}:
        assert_equal(plain[name], stale[name], name)
    assert plain["epochs"] < 6  # stopped early
    assert len(plain["best"]) == 2
    assert stale["summary"]["updates"] == plain["steps"]
    assert stale["second summary"]["updates"] == plain["second steps"] - plain["steps"] > 0
    without = [{k: v for k, v in row.items() if "staleness/" not in k} for row in logged(tmp_path / "1")]
    assert logged(tmp_path / "0") == [row for row in without if row.keys() - {"step", "epoch"}]


WORKER_KEYS = {
    *("rank", "pushes", "refused", "max_lead", "mean_lead", "max_staleness", "mean_staleness"),
    *("wait_s", "compute_s", "leases", "taken_back", "leads", "staleness"),
}


def test_callbacks_loggers_and_what_follows_fit_with_two_workers(tmp_path: Path) -> None:
    strategy = StaleSyncStrategy(paradigm=SSP(threshold=2))
    (first,), (second,) = run_workers(live, 2, tmp_path, 2, [strategy], tmp_path)
    for name in ("epochs", "steps", "best", "weights", "validated", "tested", "summary", "second fit"):
        assert_equal(first[name], second[name], name)
    assert len(first["best"]) == len(list((tmp_path / "0" / "top").glob("*.ckpt"))) == 2
    assert first["epochs"] < 6

    for result in (first, second):
        for summary in (result["summary"], result["second summary"], *result["summaries"]):
            counts = {"updates", "joins", "leaves", "taken_back"}
            assert summary.keys() == {"paradigm", "thresholds", "apply", *counts, "phases", "workers"}
            assert summary["joins"] == summary["leaves"] == summary["taken_back"] == 0
            assert summary["paradigm"] == "SSP(threshold=2)"
            assert summary["thresholds"] == {"threshold": 2}
            assert [phase["thresholds"] for phase in summary["phases"]] == [{"threshold": 2}]
            assert [worker["rank"] for worker in summary["workers"]] == [0, 1]
            assert all(worker.keys() == WORKER_KEYS for worker in summary["workers"])
            assert summary["updates"] == sum(worker["pushes"] for worker in summary["workers"])
        assert result["summary"]["updates"] == 2 * result["steps"]
        assert result["second summary"]["updates"] == 2 * (result["second steps"] - result["steps"]) > 0
        assert result["summaries"][-1]["workers"][0]["pushes"] > 0

    model = Metered()  # the metric of the last validation is that of the final weights over all the data
    model.load_state_dict(first["weights"])
    x, y = regression_data(8 * 4 * 2, seed=1).tensors
    x, y = x[: 3 * 2 * 8], y[: 3 * 2 * 8]  # limit_val_batches=3, dealt out to two ranks
    expected = nn.functional.mse_loss(model.net(x), y)
    torch.testing.assert_close(first["metrics"]["val_error"], expected)
    torch.testing.assert_close(torch.tensor(first["validated"][0]["val_error"]), expected)

    monitored = [row for row in logged(tmp_path / "0") if row.keys() & MONITORED]
    assert len(monitored) >= first["steps"] // 2
    for row in monitored:
        assert row.keys() >= MONITORED
        assert row.get("staleness/threshold", 2) == 2
        assert 0 <= row["staleness/lead"] <= 2
        assert 0 <= row["staleness/wait_share"] <= 1
        assert row["staleness/gradient"] >= 0
        assert row["staleness/samples_per_s"] > 0
    board = EventAccumulator(str(tmp_path / "0" / "board" / "version_0"))
    board.Reload()
    assert set(board.Tags()["scalars"]) >= MONITORED | OF_SSP | {"loss", "train_error", "val_error"}


# --- optimizers of the user -------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from lightning_stale import StaleSyncStrategy
from tests.integration.models import Regression, loader, trainer, weights

class Lion(torch.optim.Optimizer):  # defined in the script, with an attribute and a helper of its own
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps = 0

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                blend(momentum, p.grad, group["beta"])
                p.data.add_(momentum.sign(), alpha=-group["lr"] / (1 + 0.1 * self.steps))
        return loss

def blend(momentum, gradient, beta):
    momentum.mul_(beta).add_(gradient, alpha=1 - beta)

class Model(Regression):
    def configure_optimizers(self):
        return Lion(self.parameters(), lr=0.02)

results = []
for strategy in ("auto", "dssp"):
    model = Model()
    trainer(1, strategy, max_epochs=2, use_distributed_sampler=False).fit(model, loader(samples=80))
    results.append(weights(model))
assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
assert not torch.equal(results[0]["net.0.weight"], Model().net[0].weight)
print("the same")
"""


def test_an_optimizer_defined_in_the_script(tmp_path: Path) -> None:
    ended = run_script(SCRIPT, tmp_path)
    assert ended.returncode == 0, ended.output
    assert "the same" in ended.output


def fit_with_lbfgs(rank: int) -> str:
    with pytest.raises(Exception, match="LBFGS") as caught:
        trainer(1, "dssp", max_epochs=1).fit(Regression("LBFGS"), loader())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_lbfgs_is_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    (error,) = run_workers(fit_with_lbfgs, 1, tmp_path)
    assert error.startswith("MisconfigurationException: LBFGS evaluates the loss several times")
    assert "torch.optim.AdamW" in error
