"""Whoever is free gets the next batch: each is trained once, and to Lightning it is an ordinary epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler, TensorDataset

from lightning_stale import ASP, BSP, SSP, BoundedDelay, StaleSyncStrategy, StragglerInjection
from lightning_stale.strategies import stale_sync
from tests.integration.harness import run_workers, signal_test, wait_for_file
from tests.integration.models import Ledger, numbered, trainer

SAMPLES = 96
PARADIGMS = [ASP(), BSP(), SSP(threshold=1), BoundedDelay()]


class Counted(Ledger):
    """Notes where it validates, and what its schedulers and its loop have counted by then."""

    def __init__(self, samples: int = SAMPLES, interval: str = "step") -> None:
        super().__init__(samples)
        self.interval, self.met, self.rates, self.batches = interval, [], [], 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches += 1
        assert 0 <= batch_idx < self.trainer.num_training_batches
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        self.met.append(
            (
                self.trainer.current_epoch,
                self.trainer.global_step,
                loop.batch_progress.current.ready,
                loop.total_batch_idx,
                len(self.rates),
                self.trainer.is_last_batch,
            )
        )

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rates.append(step) or 1.0)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]


def fit(
    rank: int, world_size: int, paradigm: Any, data: str, samples: int = SAMPLES, interval: str = "step", **options: Any
) -> dict[str, Any]:
    resumed, num_workers = options.pop("ckpt_path", None), options.pop("num_workers", 0)
    delays = StragglerInjection(factors={0: 3.0}, probability=0.3, slowdown=3.0, step_s=0.002, seed=3)
    callbacks = [delays, *options.pop("callbacks", ())]
    model = Counted(samples, interval)
    strategy = StaleSyncStrategy(paradigm=paradigm, data=data)
    t = trainer(world_size, strategy, **{"max_epochs": 2, "callbacks": callbacks, **options})
    persistent = num_workers > 1
    data_loader = DataLoader(
        TensorDataset(torch.arange(samples)), batch_size=2, num_workers=num_workers, persistent_workers=persistent
    )
    t.fit(model, data_loader, numbered(range(8)), ckpt_path=resumed)
    return {
        "pages": model.pages.detach() / -model.lr,
        "batches": model.batches,
        "end": [*model.met, (t.global_step, t.num_training_batches, t.estimated_stepping_batches, len(model.rates))],
        "summary": strategy.summary(),
    }


def fit_both(rank: int, world_size: int, paradigm: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [fit(rank, world_size, paradigm, data, **options) for data in ("on-demand", "shards")]


EPOCHS: dict[str, dict[str, Any]] = {
    "two epochs": {},
    "validation amid the epoch": {"val_check_interval": 0.25},
    "validation across epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "accumulation": {"accumulate_grad_batches": 3, "val_check_interval": 6, "interval": "epoch"},
    "a process that loads": {"num_workers": 1, "accumulate_grad_batches": 3},
    "processes that stay": {"num_workers": 2, "val_check_interval": 5},
    "max_steps": {"max_steps": 15, "val_check_interval": 4, "max_epochs": -1},
    "limit_train_batches": {"limit_train_batches": 7},
}


@pytest.mark.parametrize("case", EPOCHS)
def test_lightning_counts_what_it_counts_with_shards(case: str, tmp_path: Path) -> None:
    """Where all meet, on all ranks alike, with a slow rank 0; and the sums over the samples are exact."""
    paradigm = PARADIGMS[len(case) % len(PARADIGMS)]
    results = run_workers(fit_both, 3, tmp_path, 3, paradigm, EPOCHS[case])
    for on_demand, shards in results:
        assert on_demand["end"] == shards["end"] == results[0][0]["end"]
        assert torch.equal(on_demand["pages"], results[0][0]["pages"])
    pages, each = results[0][0]["pages"], EPOCHS[case].get("accumulate_grad_batches", 1)
    if case in ("max_steps", "limit_train_batches"):
        steps = sum(on_demand["batches"] for on_demand, _ in results)
        assert steps == sum(shards["batches"] for _, shards in results)
        assert pages.sum() == 2 * steps / (3 if paradigm.averages else 1), "two samples each"
    else:
        once = torch.full((SAMPLES,), 2.0 / each / (3 if paradigm.averages else 1))
        assert torch.allclose(pages, once, rtol=1e-6), "every sample is trained once per epoch"


@pytest.mark.parametrize("paradigm", PARADIGMS, ids=repr)
def test_every_batch_is_trained_once_where_they_cannot_be_shared_out_evenly(paradigm: Any, tmp_path: Path) -> None:
    results = run_workers(fit, 4, tmp_path, 4, paradigm, "on-demand", samples=91, max_epochs=3)
    if paradigm.averages:
        return
    for result in results:
        assert torch.equal(result["pages"], torch.full((91,), 3.0))
        assert result["end"] == results[0]["end"]
    assert sum(result["batches"] for result in results) == 3 * 46
    assert sum(worker["pushes"] for worker in results[0]["summary"]["workers"]) == 3 * 46


# --- who is free takes more -------------------------------------------------------------------------------------------


class Held(Counted):
    """Rank 0 computes its first batch until rank 1 has begun as many as it may."""

    def __init__(self, folder: Path, others: int) -> None:
        super().__init__()
        self.folder, self.others = folder, others

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 0 and self.batches == 1:
            wait_for_file(self.folder / "enough")
        if self.global_rank == 1 and self.batches == self.others:
            signal_test(self.folder, "enough")
        return loss


def fit_held(rank: int, folder: Path, paradigm: Any, others: int) -> tuple[int, dict[str, Any]]:
    model = Held(folder, others)
    t = trainer(2, StaleSyncStrategy(paradigm=paradigm, data="on-demand"), max_epochs=1)
    t.fit(model, numbered(range(SAMPLES)))
    return model.batches, t.strategy.summary()


def test_one_worker_trains_what_another_has_no_time_for(tmp_path: Path) -> None:
    (held, summary), (free, _) = run_workers(fit_held, 2, tmp_path, tmp_path, ASP(), SAMPLES // 2 - 1)
    assert (held, free) == (1, SAMPLES // 2 - 1)
    # the free one has begun its last batch when the held one goes on: which of the two pushes comes first is open
    assert summary["workers"][0]["max_staleness"] in (SAMPLES // 2 - 2, SAMPLES // 2 - 1)


class Tqdm(TQDMProgressBar):
    """Notes how far the bar is at the end."""

    end = (0.0, 0.0)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.end = (self.train_progress_bar.n, self.train_progress_bar.total)
        super().on_train_epoch_end(*args)


class Rich(RichProgressBar):
    """The same of a rich one."""

    end = (0.0, 0.0)

    def on_train_epoch_end(self, *args: Any) -> None:
        if self.progress is not None:  # it is on rank 0
            task = self.progress.tasks[self.train_progress_bar_id]
            self.end = (task.completed, task.total)
        super().on_train_epoch_end(*args)


def show_progress(rank: int, bar: Any, folder: Path) -> tuple[int, Any]:
    model = Held(folder, SAMPLES // 2 - 1)
    t = trainer(2, "asp", max_epochs=1, callbacks=[bar], enable_progress_bar=True)
    t.fit(model, numbered(range(SAMPLES)))
    assert "on_train_batch_end" not in vars(bar), "it is Lightning's again"
    return model.batches, bar.end


@pytest.mark.parametrize("bar", [Tqdm(refresh_rate=5), Rich(refresh_rate=5)], ids=["tqdm", "rich"])
def test_the_progress_bar_of_a_slow_worker_ends_where_the_epoch_does(bar: Any, tmp_path: Path) -> None:
    (batches, end), _ = run_workers(show_progress, 2, tmp_path, bar, tmp_path)
    assert batches == 1
    assert end == (SAMPLES // 4, SAMPLES // 4)


@pytest.mark.parametrize("delay", [2, 5])
def test_nobody_is_granted_a_batch_beyond_the_delay(delay: int, tmp_path: Path) -> None:
    (held, summary), (free, _) = run_workers(fit_held, 2, tmp_path, tmp_path, BoundedDelay(delay), delay - 1)
    assert held + free == SAMPLES // 2
    assert all(worker["max_staleness"] <= (delay - 1) + 1 for worker in summary["workers"])
    assert summary["workers"][0]["max_staleness"] >= delay - 1, "so many were trained meanwhile"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(rank: int, folder: Path) -> None:
    """Save amid the second epoch."""
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(rank, 3, BoundedDelay(), "on-demand", callbacks=[checkpoint], enable_checkpointing=True)


def resume(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return fit(rank, world_size, BoundedDelay(), "on-demand", ckpt_path=folder / "step=20.ckpt")


def test_a_resumed_run_trains_exactly_the_rest(tmp_path: Path) -> None:
    run_workers(save, 3, tmp_path / "save", tmp_path)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={5 * n}.ckpt" for n in range(1, 7)}
    entry = torch.load(tmp_path / "step=20.ckpt", weights_only=False)["lightning_stale"]["data"]
    assert (entry["epoch"], entry["committed"]) == (1, [[0, 12]]), "48 batches an epoch, 16 steps of three workers"
    for world_size in (3, 2):
        for result in run_workers(resume, world_size, tmp_path / str(world_size), world_size, tmp_path):
            assert torch.equal(result["pages"], torch.full((SAMPLES,), 2.0))
            assert result["end"][-1][0] == 20 + 36 // world_size


def resume_in_another_order(rank: int, folder: Path) -> None:
    L.seed_everything(17)
    with pytest.raises(Exception, match=r"the order of its batches is another one now: have the same seed"):
        fit(rank, 3, BoundedDelay(), "on-demand", ckpt_path=folder / "step=20.ckpt")


def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path) -> None:
    run_workers(save, 3, tmp_path / "save", tmp_path)
    run_workers(resume_in_another_order, 3, tmp_path / "resume", tmp_path)


# --- steps that push nothing ------------------------------------------------------------------------------------------


class Overflowing(Counted):
    """The loss of every fifth batch of a worker is infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (float("inf") if self.batches % 5 == 0 else 1.0)


def fit_overflowing(rank: int) -> tuple[int, list[Any], int, Tensor]:
    plugin = MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=10**6)
    )
    model = Overflowing()
    strategy = StaleSyncStrategy(paradigm="asp", data="on-demand")
    t = trainer(2, strategy, max_epochs=1, plugins=plugin)
    t.fit(model, numbered(range(SAMPLES)), numbered(range(8)))
    return model.batches, model.met, sum(worker["pushes"] for worker in strategy.summary()["workers"]), model.pages


def test_a_step_that_is_skipped_is_done_with_its_batch(tmp_path: Path) -> None:
    results = run_workers(fit_overflowing, 2, tmp_path)
    assert sum(batches for batches, *_ in results) == SAMPLES // 2
    skipped = sum(batches // 5 for batches, *_ in results)
    assert skipped > 0
    for _, met, pushes, pages in results:
        assert met == results[0][1] == [(0, 24, 24, 23, 25, True)]
        assert pushes == SAMPLES // 2 - skipped
        assert torch.equal(pages / -Counted.lr, (pages != 0).float())
        assert (pages != 0).sum() == 2 * pushes


# --- what cannot be handed out ----------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(SAMPLES))


class Forwards(Sampler[int]):
    """A sampler of the user's, which Lightning wraps."""

    def __iter__(self) -> Any:
        return iter(range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class Backwards(BatchSampler):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


class Meeting(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", 1.0, on_step=True, sync_dist=True)
        return super().training_step(batch, batch_idx)


DATA = TensorDataset(torch.arange(SAMPLES))
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "stream": (Counted, lambda: DataLoader(Stream()), {}, "the training data is iterable"),
    "batch sampler": (
        Counted,
        lambda: DataLoader(DATA, batch_sampler=Backwards(SequentialSampler(DATA), 2, False)),
        {},
        "has a Backwards for a batch sampler",
    ),
    "own sampler": (
        Counted,
        lambda: DataLoader(DATA, sampler=SequentialSampler(DATA)),
        {"use_distributed_sampler": False},
        "has a SequentialSampler, where Lightning would put its own",
    ),
    "a collective in a step": (Meeting, lambda: numbered(range(SAMPLES)), {}, "do not meet amid a step"),
    "several loaders": (Counted, lambda: [numbered(range(8)), numbered(range(8))], {}, "batches of 2 training loaders"),
    "few batches": (Counted, lambda: numbered(range(2)), {}, "1 batches cannot be shared by 2 workers"),
    "amid a step": (
        Counted,
        lambda: numbered(range(SAMPLES)),
        {"accumulate_grad_batches": 3, "val_check_interval": 4},
        "ends amid a step of accumulate_grad_batches=3: write a multiple of 3",
    ),
}


def fit_refused(rank: int, case: str, wish: dict[str, Any]) -> None:
    model, data, options, text = REFUSED[case]
    t = trainer(2, StaleSyncStrategy(paradigm="asp", **wish), max_epochs=1, **options)
    with pytest.raises(Exception, match=text) as raised:
        t.fit(model(), data(), numbered(range(8)))
    cures = ("elastic=False", "which is not elastic", "devices=1") if "elastic" in wish else ("shards", "devices=1")
    assert any(cure in str(raised.value) for cure in cures), str(raised.value)


def refuse_all(rank: int, wish: dict[str, Any]) -> None:
    for case in REFUSED:
        fit_refused(rank, case, wish)


@pytest.mark.parametrize("wish", [{"data": "on-demand"}, {"elastic": True}], ids=repr)
def test_what_cannot_be_handed_out_is_refused_with_the_cure(wish: dict[str, Any], tmp_path: Path) -> None:
    """An elastic run hands out all batches, and has no shards instead."""
    run_workers(refuse_all, 2, tmp_path, wish)


FALLING_BACK: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"batch_sampler": Backwards(SequentialSampler(DATA), 2, False)}, {}, "has a Backwards for a batch sampler"),
    ({"sampler": Forwards(), "batch_size": 2}, {}, "has a DistributedSamplerWrapper, where"),
    ({"batch_size": 2}, {"accumulate_grad_batches": 2, "val_check_interval": 5}, "ends amid a step of acc"),
    ({"batch_size": 2}, {"accumulate_grad_batches": 4, "val_check_interval": 0.25}, "which is 6 batches, ends amid"),
    ({"batch_size": SAMPLES}, {}, "1 batches cannot be shared by 2 workers"),
]
"""What loader and Trainer are made with, and what the note says."""


def fall_back(rank: int, paradigm: Any) -> list[tuple[Tensor, int, list[str]]]:
    results = []
    for data, options, _ in FALLING_BACK:
        notes: list[str] = []
        stale_sync.rank_zero_info = notes.append
        model = Counted()
        t = trainer(2, StaleSyncStrategy(paradigm=paradigm), max_epochs=1, **options)
        t.fit(model, DataLoader(DATA, **data), numbered(range(8)))
        results.append((model.pages.detach() / -model.lr, t.num_training_batches, notes))
    return results


@pytest.mark.parametrize("paradigm", [ASP(), BoundedDelay()], ids=repr)
def test_where_it_is_a_matter_of_choice_they_have_shards_instead(paradigm: Any, tmp_path: Path) -> None:
    for results in run_workers(fall_back, 2, tmp_path, paradigm):
        for (data, options, text), (pages, batches, (note,)) in zip(FALLING_BACK, results, strict=True):
            assert note.startswith("Every worker has training data of its own")
            assert text in note
            assert batches == (1 if data.get("batch_size") == SAMPLES else SAMPLES // 4)
            assert torch.equal(pages, torch.full((SAMPLES,), 1.0 / options.get("accumulate_grad_batches", 1)))


def take_what_comes(rank: int, paradigm: Any, folder: Path) -> tuple[int, Tensor]:
    """Rank 0 computes its first batch until rank 1 has begun all others."""
    model = Held(folder, SAMPLES // 2 - 1)
    trainer(2, paradigm, max_epochs=1).fit(model, numbered(range(SAMPLES)))
    return model.batches, model.pages.detach() / -model.lr


def test_asp_hands_out_batches_without_another_word(tmp_path: Path) -> None:
    held, free = run_workers(take_what_comes, 2, tmp_path, "asp", tmp_path)
    assert (held[0], free[0]) == (1, SAMPLES // 2 - 1)
    for _, pages in (held, free):
        assert torch.equal(pages, torch.ones(SAMPLES))


def resume_again_and_again(rank: int, folder: Path) -> dict[str, Any]:
    def fit(name: str, until: int, goes_on_from: Path | None = None) -> Path:
        strategy = StaleSyncStrategy(paradigm="bounded-delay", data="on-demand")
        saves = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        t = trainer(2, strategy, max_steps=until, enable_checkpointing=True, callbacks=[saves])
        t.fit(Ledger(32), numbered(range(32)), ckpt_path=goes_on_from, weights_only=False)
        return folder / name / f"step={until}.ckpt"

    fit("whole", 30)
    at_end_of_epoch = fit("first", 8)
    amid_epoch = fit("second", 12, at_end_of_epoch)
    at_another_end = fit("third", 24, amid_epoch)
    fit("fourth", 30, at_another_end)
    if rank > 0:
        return {}
    loops = {}
    for name, steps in {"second": (10, 12), "third": (14, 16, 24), "fourth": (26, 30)}.items():
        for step in steps:
            loops[step] = [
                torch.load(folder / run / f"step={step}.ckpt", weights_only=False)["loops"]["fit_loop"]
                for run in ("whole", name)
            ]
    pages = torch.load(folder / "fourth" / "step=30.ckpt", weights_only=False)["state_dict"]["pages"]
    return {"loops": loops, "taken": (-pages / Ledger.lr).tolist()}


def test_what_is_resumed_at_the_end_of_an_epoch_counts_as_what_was_never_interrupted(tmp_path: Path) -> None:
    """Lightning alone takes the next epoch for one that had begun, and the resume after that begins an epoch anew."""
    found, _ = run_workers(resume_again_and_again, 2, tmp_path, tmp_path)
    for step, (whole, resumed) in found["loops"].items():
        for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
            expected, counts = whole[name], resumed[name]
            assert counts == expected, f"step {step}: {name}"
    assert sorted(found["taken"]) == [3.0] * 8 + [4.0] * 24  # 6 of the 8 steps of the fourth epoch
