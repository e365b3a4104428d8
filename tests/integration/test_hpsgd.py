"""HPSGD in real processes: the weights are those of the reference, nothing is lost, nobody waits, and failures end it.

What the rounds compute is tested in ``tests/unit/averaging``; here, that Lightning's hooks call them as they must. What
every strategy must do is taken from the tests of the others: recipes, meeting points, checkpoints and faults.
"""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_stale import HPSGDStrategy, StragglerInjection
from lightning_stale.averaging import reducer
from tests.integration import test_bad_input, test_checkpoints, test_failures, test_features, test_invariants
from tests.integration.harness import run_script, run_workers, workers
from tests.integration.models import (
    Ledger,
    Regression,
    assert_equal,
    assert_same,
    loader,
    numbered,
    trainer,
    weights,
)
from tests.integration.test_failures import assert_failed, under_way
from tests.unit.averaging import reference


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


# --- the weights are those of the reference ---------------------------------------------------------------------------

BATCHES = 7  # per epoch: divides by no interval
EXACT: list[tuple[dict[str, Any], tuple[str, dict[str, Any]]]] = [
    ({"interval": 1}, ("SGD", {"lr": 0.05})),
    ({"interval": 2, "merge": "cocod"}, ("SGD", {"lr": 0.02, "momentum": 0.9})),
    ({"interval": 5}, ("Adam", {"lr": 0.01})),
    ({"interval": 2, "outer_optimizer": nesterov}, ("SGD", {"lr": 0.05})),
]


def own_batches(rank: int) -> Any:
    return loader(samples=8 * BATCHES, seed=rank)


def fit_exactly(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    reducer.BUCKET_ELEMENTS = 50  # several collectives a round
    results = []
    for options, (optimizer, settings) in EXACT:
        model, strategy = Regression(optimizer, **settings), HPSGDStrategy(**options)
        t = trainer(world_size, strategy, max_epochs=2, use_distributed_sampler=False)
        t.fit(model, own_batches(rank))
        results.append(weights(model))
    return results


def refer(world_size: int, options: dict[str, Any], optimizer: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    models = [Regression(optimizer, **settings) for _ in range(world_size)]
    optimizers = [model.configure_optimizers() for model in models]
    batches = [list(own_batches(rank)) for rank in range(world_size)]

    def step(rank: int, number: int) -> None:
        optimizers[rank].zero_grad()
        models[rank].loss(batches[rank][number % BATCHES]).backward()
        optimizers[rank].step()

    reference.hpsgd(
        [list(model.parameters()) for model in models],
        step,
        steps=2 * BATCHES,
        interval=options["interval"],
        merge=options.get("merge", "hpsgd"),
        outer=reference.nesterov(0.7, 0.9) if "outer_optimizer" in options else reference.subtract,
        flushes=[BATCHES],
    )
    return weights(models[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_weights_equal_the_reference(world_size: int, tmp_path: Path) -> None:
    ranks = run_workers(fit_exactly, world_size, tmp_path, world_size)
    for place, (options, (optimizer, settings)) in enumerate(EXACT):
        expected = refer(world_size, options, optimizer, settings)
        for results in ranks:
            assert_same(results[place], expected, atol=1e-6)


# --- every local change reaches the global weights exactly once -------------------------------------------------------

WORLD_SIZE = 4
SAMPLES = 2 * 10 * WORLD_SIZE


def delays() -> StragglerInjection:
    return StragglerInjection(factors={1: 3.0}, probability=0.5, slowdown=3.0, step_s=0.001, seed=1)


def keep_ledger(rank: int, strategies: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Fit 2 epochs with every kind of meeting point, and once more from the middle of the first."""
    results = []
    for place, strategy in enumerate(strategies):
        points, own, fresh = test_checkpoints.Points(), folder / str(place), copy.deepcopy(strategy)
        callbacks = [
            points,
            delays(),
            ModelCheckpoint(own, filename="end-{epoch}", save_top_k=-1),
            ModelCheckpoint(own, filename="{step}", save_top_k=-1, every_n_train_steps=4),
        ]
        data = numbered(range(SAMPLES)), numbered(range(8))
        model = Ledger(SAMPLES)
        options = {"max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": True, "val_check_interval": 0.5}
        t = trainer(WORLD_SIZE, strategy, **options)
        t.fit(model, *data)

        resumed = Ledger(SAMPLES)
        again = trainer(WORLD_SIZE, fresh, max_epochs=2, callbacks=[delays()])
        again.fit(resumed, *data, ckpt_path=own / "step=4.ckpt")
        results.append({"seen": points.seen, "final": weights(model), "summary": t.strategy.summary()})
        results[-1] |= {"resumed": weights(resumed), "resumed summary": again.strategy.summary()}
    return results


def test_every_change_is_applied_once_across_meeting_points_and_resume(tmp_path: Path) -> None:
    strategies = [HPSGDStrategy(), HPSGDStrategy(merge="cocod"), HPSGDStrategy(interval=3)]
    ranks = run_workers(keep_ledger, WORLD_SIZE, tmp_path, strategies, tmp_path)
    start, steps = Ledger(SAMPLES), 2 * 10
    expected = start.weight.detach() - start.lr * steps * start.slope
    for results in zip(*ranks, strict=True):
        for result in results:
            assert {name for name, *_ in result["seen"]} == {
                *("validation", "validated", "checkpoint", "epoch end", "train end", "fit end")
            }
            for name, step, _, held in result["seen"]:
                assert torch.equal(held["weight"], start.weight - start.lr * step * start.slope), name
            assert_equal([held for *_, held in result["seen"]], [held for *_, held in results[0]["seen"]])
            for run in ("final", "resumed"):
                assert torch.equal(result[run]["weight"], expected)
            assert torch.equal(result["final"]["pages"], torch.full((SAMPLES,), -start.lr * 2 / WORLD_SIZE))
            assert_same(result["resumed"], results[0]["resumed"])  # Lightning deals the rest of the epoch out anew
            assert result["resumed"]["pages"].sum() == result["final"]["pages"].sum()
            assert_equal(result["summary"], results[0]["summary"])
            assert [worker["steps"] for worker in result["summary"]["workers"]] == [steps] * WORLD_SIZE
            assert [worker["steps"] for worker in result["resumed summary"]["workers"]] == [steps - 4] * WORLD_SIZE


LENGTHS = [16, 40, 4, 60]  # samples per epoch and rank


def keep_uneven_ledger(rank: int, strategies: list[Any]) -> list[Any]:
    results = []
    for strategy in strategies:
        first = sum(LENGTHS[:rank])
        model, own = Ledger(sum(LENGTHS)), numbered(range(first, first + LENGTHS[rank]))
        t = trainer(WORLD_SIZE, strategy, max_epochs=2, callbacks=[delays()], use_distributed_sampler=False)
        t.fit(model, own, numbered(range(8)))
        results.append((weights(model), t.strategy.summary()))
    return results


def test_with_uneven_numbers_of_batches_too(tmp_path: Path) -> None:
    ranks = run_workers(keep_uneven_ledger, WORLD_SIZE, tmp_path, [HPSGDStrategy(), HPSGDStrategy(interval=3)])
    start = Ledger(sum(LENGTHS))
    expected = {
        "weight": start.weight.detach() - start.lr * sum(LENGTHS) / WORLD_SIZE * start.slope,
        "pages": torch.full_like(start.pages, -start.lr * 2 / WORLD_SIZE),
    }
    for results in zip(*ranks, strict=True):
        for held, summary in results:
            assert_same(held, expected)
            assert_equal(summary, results[0][1])
            assert [worker["steps"] for worker in summary["workers"]] == LENGTHS  # 2 epochs of batches of 2


# --- nobody waits -----------------------------------------------------------------------------------------------------

STEPS = test_invariants.STEPS
WORKER_KEYS = {"rank", "steps", "rounds", "steps_per_round", "hidden", "wait_s", "compute_s"}


def count_collectives(rank: int, strategies: list[Any], folder: Path) -> list[Any]:
    found = []
    for place, strategy in enumerate(strategies):
        counter = test_invariants.CollectiveCounter()
        t = trainer(
            2,
            strategy,
            max_epochs=1,
            callbacks=[counter, ModelCheckpoint(folder / str(place))],
            logger=CSVLogger(folder / "logs", version=place),
            log_every_n_steps=1,
            enable_checkpointing=True,
            enable_progress_bar=True,
        )
        t.fit(Regression(), loader(samples=2 * 8 * STEPS), loader(samples=16))
        found.append((counter.count, counter.names))
    return found


def test_no_collective_but_the_rounds_own_is_left_in_a_training_batch(tmp_path: Path) -> None:
    """None on the default group, whose sequence number is counted; ``ddp`` shows that the counter sees them."""
    for ddp, *ours in run_workers(
        count_collectives, 2, tmp_path, ["ddp", "hpsgd", HPSGDStrategy(interval=2)], tmp_path
    ):
        assert ddp[0] >= STEPS - 1
        assert ours == [(0, {"all_reduce"})] * 2


class RoundsSeen(L.Callback):
    """Notes how many steps and rounds each rank has had before the first validation, and its weights there."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS - 1:
            self.trained = weights(pl_module)
            self.rounds = trainer.strategy._counts.rounds

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validated = weights(pl_module)


def meet_slow_worker(rank: int, folder: Path) -> Any:
    seen = RoundsSeen()
    callbacks = [seen, test_invariants.Rendezvous(folder, 1, blocks_in=2, awaits=f"end {STEPS - 1}")]
    t = trainer(2, "hpsgd", max_epochs=1, callbacks=callbacks)
    t.fit(Regression(), loader(samples=2 * 8 * STEPS), loader(samples=16))
    return seen.rounds, seen.trained, seen.validated, t.strategy.summary()


def test_a_slow_worker_takes_fewer_steps_between_two_merges(tmp_path: Path) -> None:
    """Would hang if the fast one waited: the slow one stands still in its third batch until that has had its last."""
    fast, slow = run_workers(meet_slow_worker, 2, tmp_path, tmp_path)
    assert fast[0] <= 2  # rounds that ended in 12 steps: the slow one has launched two sums
    assert not torch.equal(fast[1]["net.0.weight"], slow[1]["net.0.weight"])
    assert_same(fast[2], slow[2])
    for *_, summary in (fast, slow):
        assert summary.keys() == {"paradigm", "updates", "workers"}
        assert summary["paradigm"] == "HPSGDStrategy(interval='auto', merge='hpsgd')"
        assert_equal(summary, fast[3])
        for place, worker in enumerate(summary["workers"]):
            assert worker.keys() == WORKER_KEYS
            assert (worker["rank"], worker["steps"], worker["rounds"]) == (place, STEPS, summary["updates"])
            assert worker["steps_per_round"] == STEPS / summary["updates"]
            assert 0 <= worker["hidden"] <= 1
            assert worker["wait_s"] >= 0
            assert worker["compute_s"] > 0


# --- what Lightning users have ----------------------------------------------------------------------------------------


class LossesFirst(Regression):
    """Manual optimization: both losses are computed before the first optimizer steps."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.other = Regression().net

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        losses = [nn.functional.mse_loss(net(x), y) for net in (self.net, self.other)]
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.Adam(self.other.parameters(), lr=0.01)]


def losses_first() -> test_features.Recipe:
    return LossesFirst(), {}


# A bias before batch norm has no gradient but rounding errors, which Adam makes large; they change nothing else.
ROUNDING = {"awkward_parameters": {"thawed.bias", "net.0.bias", "net.1.running_mean"}}
RECIPES = [*test_features.RECIPES, losses_first]


def fit_recipes(rank: int, world_size: int, strategies: list[Any]) -> dict[str, list[dict[str, Any]]]:
    results = {}
    for recipe in RECIPES:
        results[recipe.__name__] = []
        for strategy in strategies:
            L.seed_everything(1)
            model, options = recipe()
            start = weights(model)
            options = {"max_epochs": 3, "use_distributed_sampler": world_size > 1, **options}
            t = trainer(world_size, copy.deepcopy(strategy), **options)
            t.fit(model, loader(samples=world_size * 8 * 11), loader(samples=32, seed=1))
            result = {"start": start, "weights": weights(model), "steps": t.global_step}
            results[recipe.__name__].append(result | {"metrics": {**t.callback_metrics}})
    return results


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    strategies = ["auto", HPSGDStrategy(merge="cocod"), HPSGDStrategy(merge="cocod", interval=3)]
    return run_workers(fit_recipes, 1, tmp_path_factory.mktemp("one"), 1, strategies)[0]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_workers(fit_recipes, 2, tmp_path_factory.mktemp("two"), 2, [HPSGDStrategy(interval=2), "hpsgd"])


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in RECIPES])
def test_one_worker_equals_the_plain_trainer(recipe: str, one_worker: Any) -> None:
    plain, *ours = one_worker[recipe]
    assert any(not torch.equal(plain["start"][name], value) for name, value in plain["weights"].items())
    for other in ours:
        theirs, own = (
            {name: value for name, value in result["weights"].items() if name not in ROUNDING.get(recipe, ())}
            for result in (plain, other)
        )
        assert_same(theirs, own, atol=1e-4 if recipe.startswith("bf16") else 1e-5)
        assert other["steps"] == plain["steps"]
        assert other["metrics"].keys() == plain["metrics"].keys()


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in RECIPES])
def test_two_workers_end_with_the_same_weights(recipe: str, two_workers: Any) -> None:
    for one, other in zip(*(results[recipe] for results in two_workers), strict=True):
        assert_equal(one["weights"], other["weights"])
        assert any(not torch.equal(one["start"][name], value) for name, value in one["weights"].items())
        assert all(value.isfinite().all() for value in one["weights"].values())


def test_callbacks_loggers_and_what_follows_fit(tmp_path: Path) -> None:
    (first,), (second,) = run_workers(test_features.live, 2, tmp_path, 2, [HPSGDStrategy()], tmp_path)
    for name in ("epochs", "steps", "best", "weights", "validated", "tested", "summary", "second fit"):
        assert_equal(first[name], second[name], name)
    assert len(first["best"]) == 2
    assert first["files"] == sorted(first["best"])
    assert first["epochs"] < 6  # stopped early
    assert first["second steps"] > first["steps"]
    assert [worker["steps"] for worker in first["summary"]["workers"]] == [first["steps"]] * 2
    model = test_features.Metered()
    model.load_state_dict(first["weights"])
    x, y = test_features.regression_data(8 * 4 * 2, seed=1).tensors
    expected = nn.functional.mse_loss(model.net(x[: 3 * 2 * 8]), y[: 3 * 2 * 8])  # dealt out to two ranks
    torch.testing.assert_close(torch.tensor(first["validated"][0]["val_error"]), expected)


def test_straggler_injection_and_another_backend_name_are_taken() -> None:
    strategy = trainer(2, "hpsgd", callbacks=[StragglerInjection(factors={0: 2.0})]).strategy
    assert (strategy.interval, strategy.merge, strategy.outer_optimizer) == ("auto", "hpsgd", None)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_resumes_with_the_same_and_another_number_of_workers_and_under_ddp(tmp_path: Path) -> None:
    (ended, _) = run_workers(test_checkpoints.fit_and_save, 2, tmp_path / "fit", 2, "hpsgd", tmp_path)
    end, middle, after = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("end", "middle", "after"))
    for saved in (end, after):
        assert_same(saved["state_dict"], ended["weights"])
        assert_equal(saved["optimizer_states"], [ended["optimizer"]])
        assert saved["lightning_stale_hpsgd"] == {"outer": None}
    assert (middle["global_step"], end["global_step"]) == (6, test_checkpoints.BATCHES)
    for name in ("weights", "after_weights"):
        alone = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert_same(alone["state_dict"], ended["weights"])
        assert not alone.keys() & {"optimizer_states", "lightning_stale_hpsgd"}
    plain = test_checkpoints.Model.load_from_checkpoint(tmp_path / "end.ckpt", optimizer="SGD")
    assert_same(weights(plain), ended["weights"])

    checkpoints = [end, middle, after, end]
    paths = [tmp_path / f"{name}.ckpt" for name in ("end", "middle", "after", "end")]
    strategies = ["hpsgd", HPSGDStrategy(interval=3), HPSGDStrategy(outer_optimizer=nesterov), "ddp"]
    two = run_workers(test_checkpoints.resume, 2, tmp_path / "two", 2, strategies, paths)
    for place, checkpoint in enumerate(checkpoints):
        test_checkpoints.check_resumed(checkpoint, [results[place] for results in two])
    one = run_workers(test_checkpoints.resume, 1, tmp_path / "one", 1, ["hpsgd", "auto"], paths[:1] * 2)
    for result in one[0]:
        test_checkpoints.check_resumed(end, [result])


def test_a_checkpoint_of_ddp_resumes_under_hpsgd(tmp_path: Path) -> None:
    run_workers(test_checkpoints.fit_and_save, 1, tmp_path / "fit", 1, "ddp", tmp_path)
    results = run_workers(test_checkpoints.resume, 2, tmp_path / "resume", 2, ["hpsgd"], [tmp_path / "end.ckpt"])
    test_checkpoints.check_resumed(torch.load(tmp_path / "end.ckpt", weights_only=True), [r[0] for r in results])


def split_run(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """2 epochs; 1 epoch and a resumed one; the same without the state of the outer optimizer."""
    results = {}

    def fit(epochs: int, ckpt_path: Path | None = None, save: bool = False) -> dict[str, Tensor]:
        model = Regression("SGD", lr=0.05)
        strategy = HPSGDStrategy(interval=3, outer_optimizer=nesterov)
        callbacks = [ModelCheckpoint(folder, filename="end")] if save else []
        t = trainer(2, strategy, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=save)
        t.fit(model, loader(samples=2 * 8 * 10), loader(samples=16, seed=1), ckpt_path=ckpt_path)
        return weights(model)

    results["whole"] = fit(2)
    fit(1, save=True)
    results["split"] = fit(2, folder / "end.ckpt")
    if rank == 0:
        checkpoint = torch.load(folder / "end.ckpt", weights_only=False)
        torch.save({k: v for k, v in checkpoint.items() if k != "lightning_stale_hpsgd"}, folder / "without.ckpt")
    torch.distributed.barrier()
    results["without"] = fit(2, folder / "without.ckpt")
    return results


def test_the_outer_optimizer_is_saved_and_restored(tmp_path: Path) -> None:
    """With a fixed interval and stateless inner optimizers, two epochs are the same in one run and in two."""
    for results in run_workers(split_run, 2, tmp_path, tmp_path):
        assert_same(results["whole"], results["split"])
        assert not torch.equal(results["whole"]["net.0.weight"], results["without"]["net.0.weight"])
    outer = torch.load(tmp_path / "end.ckpt", weights_only=True)["lightning_stale_hpsgd"]["outer"]
    assert [state["momentum_buffer"].shape for state in outer["state"].values()] == [(16, 8), (16,), (1, 16), (1,)]
    assert outer["param_groups"][0]["lr"] == 0.7


# --- failures ---------------------------------------------------------------------------------------------------------


def train(rank: int, *args: Any, **options: Any) -> None:
    test_failures.train(rank, *args, **options)


@pytest.mark.parametrize(
    ("place", "on_rank", "interval"),
    [
        ("training_step", 0, "auto"),
        ("training_step", 1, "auto"),
        ("training_step", 0, 4),
        ("validation_step", 1, "auto"),
        ("beside a collective", 1, 4),
    ],
)
def test_an_exception_in_one_worker_is_shown_by_all(place: str, on_rank: int, interval: Any, tmp_path: Path) -> None:
    strategy = HPSGDStrategy(interval=interval)
    with workers(train, 2, tmp_path, tmp_path, strategy, fault=(place, on_rank), validates=True) as group:
        ended = group.join(timeout=30)
    fault = f"ValueError: a fault in {place} of rank {on_rank}"
    assert_failed(ended[on_rank], fault)
    assert "RunFailedError" not in ended[on_rank].error
    assert_failed(ended[1 - on_rank], "RunFailedError", f"rank {on_rank} raised ValueError", fault)


@pytest.mark.parametrize(("killed", "interval"), [(1, "auto"), (0, "auto"), (1, 4)])
def test_the_other_names_a_worker_that_is_killed(killed: int, interval: Any, tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, tmp_path, HPSGDStrategy(interval=interval)) as group:
        under_way(group)
        os.kill(group.pid(killed), signal.SIGKILL)
        ended = group.join(timeout=10)
    assert ended[killed].exitcode == -signal.SIGKILL
    assert_failed(ended[1 - killed], f"RunFailedError: rank {killed}")


def test_a_worker_is_named_that_is_killed_while_the_other_waits_for_it_in_a_collective(tmp_path: Path) -> None:
    fault = ("SIGKILL beside a collective", 1)
    with workers(train, 2, tmp_path, tmp_path, "hpsgd", fault=fault, validates=True) as group:
        ended = group.join(timeout=30)
    assert_failed(ended[0], "RunFailedError: rank 1", "direct cause", "RuntimeError", "gloo")


@pytest.mark.parametrize(
    ("signum", "on_rank", "interval", "raised", "told"),
    [
        (signal.SIGTERM, 0, "auto", "SIGTERMException", "received SIGTERM"),
        (signal.SIGTERM, 1, 4, "SIGTERMException", "received SIGTERM"),
        (signal.SIGINT, 1, "auto", "KeyboardInterrupt", "was interrupted"),
        (signal.SIGINT, 0, 4, "KeyboardInterrupt", "was interrupted"),
    ],
)
def test_a_signal_to_one_worker_ends_all_alike(
    signum: int, on_rank: int, interval: Any, raised: str, told: str, tmp_path: Path
) -> None:
    with workers(train, 2, tmp_path, tmp_path, HPSGDStrategy(interval=interval)) as group:
        under_way(group)
        os.kill(group.pid(on_rank), signum)
        ended = group.join(timeout=30)
    for worker in ended:
        assert_failed(worker, raised)
    assert_failed(ended[1 - on_rank], f"rank {on_rank} {told}")
    assert "RunFailedError" not in ended[on_rank].error


CAUGHT = """
import time
from pathlib import Path

import torch

import lightning_stale
from tests.integration.models import Regression, trainer

class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(2, 8), torch.ones(2, 1)

class Model(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 3:
            raise ValueError("a fault that the script catches")
        return self.loss(batch)

t = trainer(2, "hpsgd", max_epochs=1)
try:
    t.fit(Model(), torch.utils.data.DataLoader(Endless(), batch_size=None))
except Exception as error:
    assert "a fault that the script catches" in str(error), error
    Path(f"caught-{t.global_rank}").touch()
while not Path(f"caught-{1 - t.global_rank}").exists():
    time.sleep(0.02)
print(f"rank {t.global_rank} ends")
"""


def test_a_failed_worker_that_lives_on_ends_the_run_too(tmp_path: Path) -> None:
    """It breaks no connection, and the others, who never wait, have batches for ever."""
    ended = run_script(CAUGHT, tmp_path, timeout=45)
    assert ended.returncode == 0, ended.output
    assert "rank 0 ends" in ended.output
    assert "rank 1 ends" in ended.output


SPAWN = """
import lightning_stale
from tests.integration.models import Regression, loader, trainer

if __name__ == "__main__":
    t = trainer(2, lightning_stale.HPSGDStrategy(start_method="spawn"), max_epochs=2)
    t.fit(Regression("Adam", lr=0.01), loader(samples=2 * 8 * 10), loader(samples=16))
    print([worker["steps"] for worker in t.strategy.summary()["workers"]], t.callback_metrics["val_loss"].item())
"""


def test_started_by_spawn(tmp_path: Path) -> None:
    ended = run_script(SPAWN, tmp_path, timeout=60)
    assert ended.returncode == 0, ended.output
    assert "[20, 20] 0." in ended.output


def save_on_exception(rank: int, folder: Path) -> None:
    model, callbacks = test_checkpoints.Failing(1, RuntimeError), [OnExceptionCheckpoint(folder)]
    t = trainer(2, "hpsgd", max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    t.fit(model, loader(samples=8 * 2 * test_checkpoints.BATCHES))


def test_on_exception_checkpoint(tmp_path: Path) -> None:
    with workers(save_on_exception, 2, tmp_path, tmp_path / "saved") as group:
        for worker in group.join(timeout=30):
            assert_failed(worker, "as planned")
    saved = torch.load(tmp_path / "saved" / "on_exception.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == 4  # momentum of each parameter
    test_checkpoints.Model("SGD").load_state_dict(saved["state_dict"])


def train_unevenly(rank: int, folder: Path, strategy: Any, options: dict[str, Any]) -> None:
    """Rank 0 has 4 batches, rank 1 has 8."""
    callbacks = []
    if steps := options.pop("every_n_train_steps", None):
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=steps, save_top_k=-1))
    options |= {"max_epochs": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    t = trainer(2, strategy, callbacks=callbacks, **options)
    t.fit(Regression(), loader(samples=32 * (1 + rank)), loader(samples=16))


@pytest.mark.parametrize(
    ("strategy", "options", "places"),
    [
        ("hpsgd", {"every_n_train_steps": 6}, ("a collective operation (reduce) (step 6)", "validation (step 4)")),
        (
            HPSGDStrategy(interval=2),
            {"val_check_interval": 3},
            ("validation (step 6)", "the end of an epoch (step 4)"),
        ),
    ],
    ids=["checkpoint", "validation"],
)
def test_workers_at_different_places_are_told_so(strategy: Any, options: Any, places: Any, tmp_path: Path) -> None:
    with workers(train_unevenly, 2, tmp_path, tmp_path, strategy, options) as group:
        for worker in group.join(timeout=30):
            assert_failed(worker, "the workers met at different places", *places, "val_check_interval=1.0")


# --- optimizers of any kind -------------------------------------------------------------------------------------------


class Sparse(L.LightningModule):
    """An embedding with sparse gradients, of which SparseAdam moves the rows that a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, 2, sparse=True)
        nn.init.zeros_(self.rows.weight)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.rows(torch.tensor([self.global_rank, 2])) - 1).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(self.parameters(), lr=0.1)


def fit_with_local_steps(rank: int) -> tuple[Tensor, dict[str, Tensor], float, float]:
    sparse, model = Sparse(), Regression("LBFGS", lr=0.1)
    trainer(2, "hpsgd", max_epochs=1).fit(sparse, loader())
    whole = loader(batch_size=256)
    (batch,) = whole
    before = model.loss(batch).item()
    options = {"max_epochs": 6, "use_distributed_sampler": False}
    trainer(2, HPSGDStrategy(interval=2), **options).fit(model, whole)
    return sparse.rows.weight.detach(), weights(model), before, model.loss(batch).item()


def test_lbfgs_and_sparse_gradients_train_as_in_a_plain_trainer(tmp_path: Path) -> None:
    (rows, first, before, after), (others_rows, second, *_) = run_workers(fit_with_local_steps, 2, tmp_path)
    assert torch.equal(rows, others_rows)
    assert (rows[:3] > 0.1).all()  # row 0 is rank 0's alone, row 1 rank 1's, row 2 both's
    assert (rows[3:] == 0).all()
    assert_same(first, second)
    assert after < before / 2


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "texts"),
    [
        ({"interval": 0}, ValueError, ["interval=0", "'auto'", "interval=4"]),
        ({"interval": -1}, ValueError, ["interval=-1", ">= 1"]),
        ({"interval": 1.5}, ValueError, ["interval=1.5", "'auto'"]),
        ({"interval": "often"}, ValueError, ["interval='often'", "'auto'"]),
        ({"interval": True}, ValueError, ["interval=True", "'auto'"]),
        ({"interval": None}, ValueError, ["interval=None", "'auto'"]),
        ({"merge": "x"}, ValueError, ["merge='x'", "'hpsgd', 'cocod'"]),
        ({"merge": ["hpsgd"]}, ValueError, ["merge=['hpsgd']", "'hpsgd', 'cocod'"]),
        ({"outer_optimizer": 3}, TypeError, ["outer_optimizer=3", "lambda params", "SGD(params"]),
    ],
    ids=repr,
)
def test_refused_at_construction(options: dict[str, Any], error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as raised:
        HPSGDStrategy(**options)
    for text in texts:
        assert text in str(raised.value)


REFUSED = ["synchronized batch norm", "sync_batchnorm", "lazy module", "max_time", "Timer", "param group added"]
REFUSED += ["train_time_interval", "validation by time"]


class NotAnOptimizer:
    """What an ``outer_optimizer`` must not return."""

    def __init__(self, parameters: Any) -> None:
        pass


def try_all(rank: int) -> dict[str, str]:
    """Return what ``fit`` raises in each case; afterwards, the same process can train."""
    errors = {}
    for name in REFUSED:
        model, options, _ = test_bad_input.REFUSED[name]
        errors[name] = fit_and_catch("hpsgd", model(), **options)
    errors["outer"] = fit_and_catch(HPSGDStrategy(outer_optimizer=NotAnOptimizer), Regression())
    t = trainer(2, "hpsgd", max_steps=4)
    t.fit(Regression(), loader())
    assert [worker["steps"] for worker in t.strategy.summary()["workers"]] == [4, 4]
    return errors


def fit_and_catch(strategy: Any, model: Any, **options: Any) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the texts are looked at by the test
        trainer(2, strategy, **{"max_steps": 4, **options}).fit(model, loader(), loader(samples=16))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_refused_by_fit(tmp_path: Path) -> None:
    for errors in run_workers(try_all, 2, tmp_path):
        for name in REFUSED:
            assert "MisconfigurationException" in errors[name], name
            for text in test_bad_input.REFUSED[name][2]:
                assert text in errors[name], name
            assert "parameter server" not in errors[name]
        assert "outer_optimizer returned" in errors["outer"]
        assert "NotAnOptimizer" in errors["outer"]
