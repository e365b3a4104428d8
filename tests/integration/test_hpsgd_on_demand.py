"""HPSGD with batches on demand: each is trained once, committed with its round, and nobody waits for the slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import HPSGDStrategy, StragglerInjection
from tests.integration.harness import run_workers, workers
from tests.integration.models import Ledger, numbered, trainer
from tests.integration.test_failures import assert_failed
from tests.integration.test_on_demand import EPOCHS, REFUSED, SAMPLES, Counted, Held

KINDS: list[dict[str, Any]] = [{}, {"merge": "cocod"}, {"interval": 3}]


def fit(rank: int, world_size: int, kind: dict[str, Any], data: Any, samples: int = SAMPLES, **options: Any) -> Any:
    resumed, num_workers = options.pop("ckpt_path", None), options.pop("num_workers", 0)
    delays = StragglerInjection(factors={0: 3.0}, probability=0.3, slowdown=3.0, step_s=0.002, seed=3)
    model = Counted(samples, options.pop("interval", "step"))
    strategy = HPSGDStrategy(**kind, data=data)
    callbacks = [delays, *options.pop("callbacks", ())]
    t = trainer(world_size, strategy, **{"max_epochs": 2, "callbacks": callbacks, **options})
    data_loader = DataLoader(
        TensorDataset(torch.arange(samples)), 2, num_workers=num_workers, persistent_workers=num_workers > 1
    )
    t.fit(model, data_loader, numbered(range(8)), ckpt_path=resumed)
    return {
        "pages": model.pages.detach() / -model.lr * world_size,
        "batches": model.batches,
        "end": [*model.met, (t.global_step, t.num_training_batches, t.estimated_stepping_batches, len(model.rates))],
        "steps": [worker["steps"] for worker in strategy.summary()["workers"]],
    }


def fit_both(rank: int, kind: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    return [fit(rank, 3, kind, data, **options) for data in ("on-demand", "shards")]


@pytest.mark.parametrize("case", EPOCHS)
def test_lightning_counts_what_it_counts_with_shards(case: str, tmp_path: Path) -> None:
    """Where all meet, on all ranks alike, with a slow rank 0; every change is in the weights once."""
    results = run_workers(fit_both, 3, tmp_path, KINDS[len(case) % 3], EPOCHS[case])
    for on_demand, shards in results:
        assert on_demand["end"] == shards["end"] == results[0][0]["end"]
        assert torch.equal(on_demand["pages"], results[0][0]["pages"])
    pages, each = results[0][0]["pages"], EPOCHS[case].get("accumulate_grad_batches", 1)
    if case in ("max_steps", "limit_train_batches"):
        batches = sum(on_demand["batches"] for on_demand, _ in results)
        assert batches == sum(shards["batches"] for _, shards in results)
        torch.testing.assert_close(pages.sum(), torch.tensor(2.0 * batches))
    else:
        torch.testing.assert_close(pages, torch.full((SAMPLES,), 2.0 / each))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_every_batch_is_trained_once_where_they_cannot_be_shared_out_evenly(kind: Any, tmp_path: Path) -> None:
    results = run_workers(fit, 4, tmp_path, 4, kind, "on-demand", samples=91, max_epochs=3)
    for result in results:
        assert torch.equal(result["pages"], torch.full((91,), 3.0))
        assert result["end"] == results[0]["end"]
        assert sum(result["steps"]) == sum(result["batches"] for result in results) == 3 * 46


def fit_held(rank: int, folder: Path) -> tuple[int, Any, Any]:
    model = Held(folder, SAMPLES // 2 - 1)
    t = trainer(2, HPSGDStrategy(data="on-demand"), max_epochs=1)
    t.fit(model, numbered(range(SAMPLES)))
    return model.batches, t.strategy.summary()["workers"], model.pages.detach() / -model.lr


def test_one_worker_trains_what_another_has_no_time_for(tmp_path: Path) -> None:
    """Would hang if it waited for a round: rank 0 stands still in its first batch until rank 1 has all others."""
    for batches, (held, free), pages in run_workers(fit_held, 2, tmp_path, tmp_path):
        assert batches in (1, SAMPLES // 2 - 1)
        assert (held["steps"], free["steps"]) == (1, SAMPLES // 2 - 1)
        assert torch.equal(pages, torch.full((SAMPLES,), 0.5))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(rank: int, kind: dict[str, Any], folder: Path) -> None:
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(rank, 3, kind, "on-demand", callbacks=[checkpoint], enable_checkpointing=True)


def resume(rank: int, world_size: int, kind: dict[str, Any], folder: Path) -> Any:
    before = torch.load(folder / "step=20.ckpt", weights_only=True)["state_dict"]["pages"] / -Ledger.lr
    result = fit(rank, world_size, kind, "on-demand", ckpt_path=folder / "step=20.ckpt")
    return {**result, "pages": result["pages"] - before * world_size, "before": before * 3}


@pytest.mark.parametrize("kind", KINDS[::2], ids=repr)
def test_a_resumed_run_trains_exactly_the_rest(kind: Any, tmp_path: Path) -> None:
    run_workers(save, 3, tmp_path / "save", kind, tmp_path, timeout=25)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={5 * n}.ckpt" for n in range(1, 7)}
    entry = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["lightning_stale_hpsgd"]["data"]
    assert (entry["epoch"], entry["committed"]) == (1, [[0, 12]]), "48 batches an epoch, 16 steps of three workers"
    for world_size in (3, 2):
        folder = tmp_path / str(world_size)
        for result in run_workers(resume, world_size, folder, world_size, kind, tmp_path):
            before = result["before"]
            assert sorted(before.round().tolist()) == [1.0] * (SAMPLES - 24) + [2.0] * 24
            torch.testing.assert_close(before + result["pages"], torch.full((SAMPLES,), 2.0))
            assert result["end"][-1][0] == 20 + 36 // world_size


class Failing(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.batches == 9:
            raise ValueError("as planned")
        return super().training_step(batch, batch_idx)


def save_on_exception(rank: int, folder: Path) -> None:
    t = trainer(
        2,
        HPSGDStrategy(interval=2, data="on-demand"),
        max_epochs=1,
        callbacks=[OnExceptionCheckpoint(folder)],
        enable_checkpointing=True,
    )
    t.fit(Failing(), numbered(range(SAMPLES)))


def test_what_is_saved_after_a_failure_says_whose_round_was_over(tmp_path: Path) -> None:
    """Rank 1 fails in its tenth batch: the sum of its third round is under way, so two rounds are over, or three."""
    with workers(save_on_exception, 2, tmp_path, tmp_path / "saved") as group:
        for worker in group.join(timeout=60):
            assert_failed(worker, "as planned")
    saved = torch.load(tmp_path / "saved" / "on_exception.ckpt", weights_only=True)
    committed = sum(last - first for first, last in saved["lightning_stale_hpsgd"]["data"]["committed"])
    assert 0 < committed < 2 * 9


# --- what cannot be handed out ----------------------------------------------------------------------------------------


class Manual(Counted):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refuse_all(rank: int) -> None:
    cases = {**REFUSED, "manual": (Manual, lambda: numbered(range(SAMPLES)), {}, "optimization is manual, and where")}
    for model, data, options, text in cases.values():
        t = trainer(2, HPSGDStrategy(data="on-demand"), max_epochs=1, **options)
        with pytest.raises(Exception, match=text) as raised:
            t.fit(model(), data(), numbered(range(8)))
        assert "shards" in str(raised.value) or "devices=1" in str(raised.value)
        assert "StaleSyncStrategy" not in str(raised.value)


def test_what_cannot_be_handed_out_is_refused_with_the_cure(tmp_path: Path) -> None:
    run_workers(refuse_all, 2, tmp_path)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data='often' is unknown: write 'auto', 'on-demand' or 'shards'"):
        HPSGDStrategy(data="often")  # type: ignore[arg-type]
    assert repr(HPSGDStrategy(data="on-demand")) == "HPSGDStrategy(interval='auto', merge='hpsgd', data='on-demand')"
