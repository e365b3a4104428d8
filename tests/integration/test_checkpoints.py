"""Before a checkpoint all workers hold the server's weights, and it is an ordinary one that resumes anywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim import lr_scheduler

from lightning_stale import ASP, DSSP, SSP, StaleSyncStrategy, StragglerInjection
from tests.integration.harness import run_workers, workers
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

BATCHES = 10  # per epoch and worker


class Model(Regression):
    """SGD with momentum and a schedule per epoch, or Adam and one per step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.optimizer_name == "SGD":
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]
        schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


MODELS = {"SGD": {"lr": 0.05, "momentum": 0.9}, "Adam": {"lr": 0.02}}


def make(optimizer: str) -> Model:
    return Model(optimizer, **MODELS[optimizer])


# --- where all workers meet -------------------------------------------------------------------------------------------

WORLD_SIZE = 4
SAMPLES = 2 * BATCHES * WORLD_SIZE


class Points(L.Callback):
    """Notes weights and updates wherever all workers must hold the server's weights."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, dict[str, torch.Tensor]]] = []

    def _note(self, name: str, trainer: Any, module: Any) -> None:
        self.seen.append((name, trainer.global_step, trainer.strategy.summary()["updates"], weights(module)))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._note("validation", trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("validated", trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        assert_same(weights(pl_module), checkpoint["state_dict"])
        self._note("checkpoint", trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("epoch end", trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("train end", trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("fit end", trainer, pl_module)


def visit_points(rank: int, transport: Any, folder: Path) -> list[Any]:
    points = Points()
    callbacks = [
        points,
        ModelCheckpoint(folder / "epochs", save_top_k=-1),
        ModelCheckpoint(folder / "steps", save_top_k=-1, every_n_train_steps=4),
        StragglerInjection(probability=0.5, slowdown=3.0, step_s=0.002, seed=1),
    ]
    t = trainer(
        WORLD_SIZE,
        StaleSyncStrategy(paradigm=ASP(), transport=transport),
        max_epochs=2,
        callbacks=callbacks,
        enable_checkpointing=True,
        val_check_interval=0.5,
    )
    model = Ledger(SAMPLES)
    t.fit(model, numbered(range(SAMPLES)), numbered(range(8)))
    return [*points.seen, ("returned", t.global_step, t.strategy.summary()["updates"], weights(model))]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_all_workers_hold_the_servers_weights_wherever_they_meet(transport: str, tmp_path: Path) -> None:
    ranks = run_workers(visit_points, WORLD_SIZE, tmp_path, transport, tmp_path)
    start = Ledger(SAMPLES)
    for seen in ranks:
        assert {name for name, *_ in seen} == {
            *("validation", "validated", "checkpoint", "epoch end", "train end", "fit end", "returned")
        }
        for name, step, updates, held in seen:
            assert updates >= step * WORLD_SIZE, name  # another worker may have gone on since
            if name in ("train end", "fit end", "returned"):
                assert updates == step * WORLD_SIZE, name
            assert torch.equal(held["weight"], start.weight - start.lr * step * WORLD_SIZE * start.slope), name
    for others in zip(*ranks, strict=True):
        (name, step, _, held), *rest = others
        for other in rest:
            assert (other[0], other[1]) == (name, step)
            assert_same(other[3], held)


# --- one worker: bit for bit ------------------------------------------------------------------------------------------


def fit_from(
    strategy: Any, optimizer: str, epochs: int, folder: Path | None = None, ckpt_path: Path | None = None, **kwargs: Any
) -> Model:
    model = make(optimizer)
    callbacks = [] if folder is None else [ModelCheckpoint(folder, filename="end", **kwargs)]
    t = trainer(
        1,
        strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        use_distributed_sampler=False,
    )
    t.fit(model, loader(samples=8 * BATCHES), loader(samples=16, seed=1), ckpt_path=ckpt_path)
    return model


def split_run(rank: int, optimizer: str, folder: Path) -> dict[str, Any]:
    result = {"whole": weights(fit_from("auto", optimizer, 2)), "stale whole": weights(fit_from("dssp", optimizer, 2))}
    for first in ("auto", "ddp", "dssp"):
        fit_from(first, optimizer, 1, folder / first)
    for first, second in [("dssp", "dssp"), ("dssp", "auto"), ("dssp", "ddp"), ("auto", "ssp"), ("ddp", "bsp")]:
        result[f"{first}, {second}"] = weights(fit_from(second, optimizer, 2, ckpt_path=folder / first / "end.ckpt"))
    return result


@pytest.mark.parametrize("optimizer", MODELS)
def test_two_epochs_equal_one_and_a_resumed_one_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    (results,) = run_workers(split_run, 1, tmp_path, optimizer, tmp_path)
    whole = results.pop("whole")
    for name, result in results.items():
        assert_equal(whole, result, name)

    plain, stale = (
        torch.load(tmp_path / strategy / "end.ckpt", weights_only=True) for strategy in ("auto", "dssp")
    )  # an ordinary checkpoint, and one entry more
    assert stale.pop("lightning_stale")["updates"] == BATCHES
    for checkpoint in (plain, stale):
        checkpoint.pop("callbacks")  # folders and times
    assert plain.keys() == stale.keys()
    for name in plain.keys() - {"loops"}:
        assert_equal(plain[name], stale[name], name)

    loaded = Model.load_from_checkpoint(tmp_path / "dssp" / "end.ckpt", optimizer="SGD")
    assert_same(weights(loaded), stale["state_dict"])


def split_epoch(rank: int, folder: Path) -> dict[str, Any]:
    results = {}
    for strategy in ("auto", "dssp"):
        options = {"every_n_train_steps": 6, "save_top_k": 1}
        fit_from(strategy, "Adam", 1, folder / strategy, **options)
        results[strategy] = weights(fit_from(strategy, "Adam", 2, ckpt_path=folder / strategy / "end.ckpt"))
    return results


def test_a_checkpoint_within_an_epoch_resumes_as_in_the_plain_trainer(tmp_path: Path) -> None:
    (results,) = run_workers(split_epoch, 1, tmp_path, tmp_path)
    assert torch.load(tmp_path / "dssp" / "end.ckpt", weights_only=True)["global_step"] == 6
    assert_same(results["auto"], results["dssp"])


# --- several workers --------------------------------------------------------------------------------------------------


class Resumed(L.Callback):
    """Notes what the server holds when fit starts, before anybody trains."""

    state: dict[str, Any]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "state"):
            strategy = trainer.strategy
            self.state = {"step": trainer.global_step, "epoch": trainer.current_epoch, "weights": weights(pl_module)}
            if isinstance(strategy, StaleSyncStrategy):
                self.state["server"] = strategy._update.state_dict()
                self.state["optimizers"] = [strategy._update.state_of(i) for i, _ in enumerate(strategy.optimizers)]
            else:
                states = [optimizer.state_dict() for optimizer in strategy.optimizers]
                self.state["optimizers"] = copy.deepcopy(states)
            strategy.barrier()


def fit_and_save(rank: int, world_size: int, strategy: Any, folder: Path) -> dict[str, Any]:
    """Fit an epoch; save at its end, in the middle, the weights alone, and after fit."""
    model, resumed = make("SGD"), Resumed()
    t = trainer(
        world_size,
        strategy,
        max_epochs=1,
        callbacks=[
            resumed,
            ModelCheckpoint(folder, filename="end"),
            ModelCheckpoint(folder, filename="middle", every_n_train_steps=6),
            ModelCheckpoint(folder, filename="weights", save_weights_only=True, monitor="val_loss"),
            StragglerInjection(probability=0.5, slowdown=3.0, step_s=0.002, seed=1),
        ],
        enable_checkpointing=True,
    )
    t.fit(model, loader(samples=8 * BATCHES * world_size), loader(samples=16, seed=1))
    t.save_checkpoint(folder / "after.ckpt")
    t.save_checkpoint(folder / "after_weights.ckpt", weights_only=True)
    return {"weights": weights(model), "optimizer": t.optimizers[0].state_dict()}


def resume(rank: int, world_size: int, strategies: list[Any], paths: list[Path]) -> list[dict[str, Any]]:
    results = []
    for strategy, path in zip(strategies, paths, strict=True):
        model, resumed = make("SGD"), Resumed()
        t = trainer(world_size, strategy, max_epochs=3, callbacks=[resumed])
        t.fit(model, loader(samples=8 * BATCHES * world_size), loader(samples=16, seed=1), ckpt_path=path)
        summary = t.strategy.summary() if isinstance(t.strategy, StaleSyncStrategy) else None
        results.append({**resumed.state, "final": weights(model), "final step": t.global_step, "summary": summary})
    return results


def check_resumed(checkpoint: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """What every rank starts from is what the checkpoint holds, and all end with the same."""
    for result in results:
        assert_same(result["weights"], checkpoint["state_dict"])
        assert_equal(result["optimizers"], checkpoint["optimizer_states"])
        assert result["step"] == checkpoint["global_step"]
        assert_same(result["final"], results[0]["final"])
        assert not torch.equal(result["final"]["net.0.weight"], checkpoint["state_dict"]["net.0.weight"])
        assert result["final step"] > checkpoint["global_step"]


def test_a_checkpoint_of_two_workers_resumes_with_two_four_one_and_under_ddp(tmp_path: Path) -> None:
    ended = run_workers(fit_and_save, 2, tmp_path / "fit", 2, "ssp", tmp_path)
    end, middle, after = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("end", "middle", "after"))
    for saved in (end, after):
        assert_same(saved["state_dict"], ended[0]["weights"])
        assert_equal(saved["optimizer_states"], [ended[0]["optimizer"]])
    assert (middle["global_step"], end["global_step"]) == (6, BATCHES)
    for name in ("weights", "after_weights"):
        alone = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert_same(alone["state_dict"], ended[0]["weights"])
        assert not alone.keys() & {"optimizer_states", "lightning_stale"}

    for checkpoint, clock in ((end, BATCHES), (middle, 6), (after, BATCHES)):
        snapshot = checkpoint["lightning_stale"]
        assert snapshot["updates"] == 2 * clock
        assert snapshot["state"]["last_clock"] == clock
        assert [worker["pushes"] for worker in snapshot["workers"]] == [clock, clock]

    paths = [tmp_path / f"{name}.ckpt" for name in ("end", "middle", "after", "end", "end")]
    strategies = ["ssp", "ssp", StaleSyncStrategy(paradigm=SSP(), transport="tcp"), "dssp", "ddp"]
    two = run_workers(resume, 2, tmp_path / "two", 2, strategies, paths)
    for place, checkpoint in enumerate((end, middle, after, end, end)):
        check_resumed(checkpoint, [results[place] for results in two])
    for place, checkpoint in enumerate((end, middle, after)):
        snapshot = checkpoint["lightning_stale"]
        for rank, results in enumerate(two):
            server = results[place]["server"]  # a rank that already waits for the others is not among the clocks
            assert server["state"]["clocks"][rank] == snapshot["state"]["last_clock"]
            for worker, saved in zip(server["workers"], snapshot["workers"], strict=True):
                assert (worker["pushes"], worker["total_lead"]) == (saved["pushes"], saved["total_lead"])
            summary = results[place]["summary"]
            assert server["updates"] == snapshot["updates"]
            assert summary["updates"] == sum(worker["pushes"] for worker in summary["workers"])
            assert summary["updates"] == 2 * results[place]["final step"]

    four = run_workers(resume, 4, tmp_path / "four", 4, ["ssp"], paths[:1])
    check_resumed(end, [results[0] for results in four])
    assert [results[0]["server"]["state"]["clocks"][rank] for rank, results in enumerate(four)] == [BATCHES] * 4
    one = run_workers(resume, 1, tmp_path / "one", 1, ["ssp", "auto"], [paths[0], paths[0]])
    check_resumed(end, [one[0][0]])
    check_resumed(end, [one[0][1]])


def test_a_checkpoint_of_ddp_resumes_with_staleness(tmp_path: Path) -> None:
    run_workers(fit_and_save, 2, tmp_path / "fit", 2, "ddp", tmp_path)
    path = tmp_path / "end.ckpt"
    results = run_workers(resume, 2, tmp_path / "resume", 2, ["dssp", "bsp", "ddp"], [path] * 3)
    for place in range(3):
        check_resumed(torch.load(path, weights_only=True), [rank[place] for rank in results])
    for _, bsp, ddp in results:
        assert_same(bsp["final"], ddp["final"], atol=1e-6)


# --- fit again --------------------------------------------------------------------------------------------------------


def fit_twice(rank: int, strategies: list[str], folder: Path) -> list[Any]:
    results = []
    for strategy in strategies:
        model = make("SGD")
        t = trainer(1, strategy, max_epochs=1, use_distributed_sampler=False)
        data = loader(samples=8 * BATCHES), loader(samples=16, seed=1)
        t.fit(model, *data)
        t.save_checkpoint(folder / f"{strategy}.ckpt")
        t.fit_loop.max_epochs = 2
        t.fit(model, *data)
        fresh = weights(model)
        t.fit_loop.max_epochs = 3
        t.fit(model, *data, ckpt_path=folder / f"{strategy}.ckpt")
        results.append((fresh, weights(model), [o.state_dict() for o in t.optimizers], t.global_step))
    return results


def test_a_second_and_a_third_fit_equal_the_plain_trainer(tmp_path: Path) -> None:
    ((plain, stale),) = run_workers(fit_twice, 1, tmp_path, ["auto", "dssp"], tmp_path)
    assert_equal(plain, stale)


# --- when fit fails ---------------------------------------------------------------------------------------------------


class Failing(Regression):
    """Raises in one batch, on one rank or on all."""

    def __init__(self, rank: int | None, error: type[BaseException]) -> None:
        super().__init__("SGD", lr=0.05, momentum=0.9)
        self.failing_rank, self.error = rank, error

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 5 and self.failing_rank in (None, self.global_rank):
            raise self.error("as planned")
        return super().training_step(batch, batch_idx)


def fail(rank: int, world_size: int, failing_rank: int | None, error: type[BaseException], folder: Path) -> None:
    model = Failing(failing_rank, error)
    strategy, callbacks = StaleSyncStrategy(paradigm=DSSP(lower=1, upper=2)), [OnExceptionCheckpoint(folder)]
    t = trainer(world_size, strategy, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    t.fit(model, loader(samples=8 * BATCHES * world_size))


@pytest.mark.parametrize(
    ("world_size", "failing_rank", "error"),
    [(1, 0, RuntimeError), (2, 0, RuntimeError), (2, 1, RuntimeError), (2, None, KeyboardInterrupt)],
)
def test_on_exception_checkpoint(
    world_size: int, failing_rank: int | None, error: type[BaseException], tmp_path: Path
) -> None:
    arguments = (world_size, failing_rank, error, tmp_path / "saved")
    with workers(fail, world_size, tmp_path, *arguments) as group:
        ended = group.join(timeout=60)
    assert all(worker.exitcode != 0 for worker in ended)
    if error is RuntimeError:
        assert all("as planned" in worker.error for worker in ended)

    path = tmp_path / "saved" / "on_exception.ckpt"
    saved = torch.load(path, weights_only=True)
    (state,) = saved["optimizer_states"]
    assert len(state["state"]) == 4  # momentum of each parameter
    ((result,),) = run_workers(resume, 1, tmp_path / "resume", 1, ["dssp"], [path])
    check_resumed(saved, [result])


class FailingOnce(Regression):
    """Raises in its sixth step, once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise ValueError("a fault that the script catches")
        return self.loss(batch)


def save_after_a_caught_failure(rank: int, strategy: str, path: Path) -> dict[str, Any]:
    t = trainer(1, strategy, max_epochs=1, use_distributed_sampler=False)
    with pytest.raises(ValueError, match="that the script catches"):
        t.fit(FailingOnce("Adam", lr=0.01), loader())
    t.save_checkpoint(path)
    return torch.load(path, weights_only=False)


def test_after_a_caught_failure_nothing_is_lost(tmp_path: Path) -> None:
    """The optimizers' state is taken back from the server before that ends."""
    plain, stale = (
        run_workers(save_after_a_caught_failure, 1, tmp_path / strategy, strategy, tmp_path / f"{strategy}.ckpt")[0]
        for strategy in ("auto", "dssp")
    )
    assert_same(plain["state_dict"], stale["state_dict"])
    assert len(stale["optimizer_states"][0]["state"]) == 4
    assert_equal(plain["optimizer_states"], stale["optimizer_states"])
