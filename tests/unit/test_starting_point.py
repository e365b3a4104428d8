"""One who joins a fit that runs does, through Lightning's own loops, what one does who has been there all the time."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_stale.coordinator.leases import EpochLeases, Grant, Plan
from lightning_stale.data.loader import OnDemandLoader
from lightning_stale.data.on_demand import BatchesOnDemand
from lightning_stale.strategies.starting_point import StartingPoint, write_down
from tests.integration.models import assert_equal, numbered

WORKERS = 3
LENGTH = 12
SAMPLES = 2 * WORKERS * LENGTH


class Others:
    """Whoever else asks for batches, at random, and who hands them out."""

    def __init__(self, seed: int) -> None:
        self.leases, self.random = EpochLeases(WORKERS), random.Random(seed)
        self.held: dict[int, Grant] = {}
        self.plans: list[Plan] = []

    def request(self, leases: Any, plan: Plan | None) -> Grant:
        if plan is not None:
            while self._able():
                self._go_on()
            self.plans.append(plan)
            self.leases.open(plan, range(WORKERS))
            for other in range(1, WORKERS):
                self._hear(self.leases.request(other))
        if leases:
            self._hear(self.leases.commit(0, leases))
        self._hear(self.leases.request(0))
        for _ in range(self.random.randrange(5)):
            self._go_on()
        while 0 not in self.held:
            self._go_on()
        return self.held.pop(0)

    def _able(self) -> list[int]:
        return sorted(other for other, grant in self.held.items() if other and not grant.over)

    def _go_on(self) -> None:
        if able := self._able():
            other = self.random.choice(able)
            self._hear(self.leases.commit(other, [self.held.pop(other).lease]))
            self._hear(self.leases.request(other))

    def _hear(self, grants: Any) -> None:
        self.held.update(grants)


class Granted(SingleDeviceStrategy):
    """A worker's side, without a server."""

    def __init__(self, others: Others) -> None:
        super().__init__("cpu")
        self.others, self.first = others, True
        self.start: StartingPoint | None = None
        self.resumed: Any = None
        self.batches: BatchesOnDemand | None = None
        self.starts: list[tuple[bytes, Others, dict[str, Tensor], int]] = []

    @property
    def is_global_zero(self) -> bool:
        return self.start is None

    def process_dataloader(self, dataloader: Any) -> Any:
        trainer = self.lightning_module.trainer
        if not trainer.training:
            return dataloader
        joined = None if self.start is None else self.start.batches
        if self.batches is None:
            self.batches = BatchesOnDemand(
                trainer, WORKERS, self.request, resumed=self.resumed, joined=joined, before_segment=self.note
            )
        return OnDemandLoader(dataloader, WORKERS, self.batches.next_batch)

    def request(self, leases: Any, plan: Plan | None) -> Grant:
        return self.others.request(leases, plan)

    def note(self) -> None:
        if self.start is None:
            model, batches = self.lightning_module, self.batches.segment()
            data = write_down(model.trainer, batches, WORKERS)
            self.starts.append((data, copy.deepcopy(self.others), copy.deepcopy(model.state_dict()), len(model.trace)))

    def meet(self) -> None:
        if self.batches is not None:
            self.batches.has_met()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.meet()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        checkpoint["batches"] = self.batches.state_dict(self.others.leases.state_dict())
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self.resumed = checkpoint["batches"]
        return checkpoint

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        self.batches.took_step(None)
        return result


class Model(L.LightningModule):
    def __init__(self, interval: str, grows: bool) -> None:
        super().__init__()
        self.interval, self.grows = interval, grows
        self.weight, self.frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("queue", torch.zeros(0), persistent=False)
        self.trace: list[Any] = []
        self.saved = 0

    def note(self, what: str, *more: Any) -> None:
        trainer, loop = self.trainer, self.trainer.fit_loop.epoch_loop
        rates = [group["lr"] for group in self.optimizers(False).param_groups]
        self.trace.append((what, *more, trainer.fit_loop.state_dict(), loop._batches_that_stepped, rates))

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is not None:  # Lightning leaves out the hook below where it resumes amid an epoch
            self.losses = []

    def on_train_epoch_start(self) -> None:
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.losses.append(1.0)
        self.note("train", batch_idx, batch[0].tolist(), self.trainer.is_last_batch)
        self.log("loss", float(self.global_step), on_step=True, on_epoch=True)
        return (self.weight * batch[0].float().mean()).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        self.frozen += 0.5
        if self.grows and self.seen < 4:
            self.queue = torch.cat([self.queue, self.seen])

    def on_validation_start(self) -> None:
        self.note("validation")
        self.trainer.strategy.meet()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", -float(self.global_step))

    def on_train_epoch_end(self) -> None:
        self.trainer.strategy.meet()
        self.note(
            "epoch", {name: float(value) for name, value in self.trainer.callback_metrics.items() if name == "val"}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trainer.strategy.barrier()
        checkpoint["of the model"] = float(self.trainer.strategy.reduce(torch.tensor(float(self.global_step))))
        assert "weight" in checkpoint["state_dict"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["of the model"]
        assert checkpoint["state_dict"]["weight"].shape == (3,)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.weight], lr=0.5)
        if self.interval == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return [optimizer], [
                {"scheduler": plateau, "monitor": "val", "frequency": self.trainer.check_val_every_n_epoch}
            ]
        total = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


CASES: dict[str, dict[str, Any]] = {
    "epochs": {},
    "validation amid the epoch": {"val_check_interval": 0.25},
    "validation across epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "validation every other epoch": {"check_val_every_n_epoch": 2, "interval": "plateau", "max_epochs": 4},
    "checkpoints amid the epoch": {"every": 5},
    "accumulation": {"accumulate_grad_batches": 3, "val_check_interval": 6, "every": 3},
    "max_steps": {"max_steps": 29, "max_epochs": -1, "val_check_interval": 4},
    "no sanity check": {"num_sanity_val_steps": 0, "grows": True, "val_check_interval": 0.5},
    "loaders anew in every epoch": {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 6},
}


def fit(
    strategy: Granted, folder: Path, *, every: int = 0, interval: str = "step", grows: bool = False, **options: Any
) -> Model:
    model = Model(interval, grows)
    resume = options.pop("ckpt_path", None)
    callbacks = [
        ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **({"every_n_train_steps": every} if every else {})),
        EarlyStopping("val", patience=1000),
        *([] if grows else [EMAWeightAveraging(decay=0.5)]),  # which has no room for what grows
        *options.pop("callbacks", ()),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
        **{"max_epochs": 3, **options},
    )
    trainer.fit(model, numbered(range(SAMPLES)), numbered(range(4)), ckpt_path=resume)
    return model


class Join(L.Callback):
    """Begins where ``data`` says; the weights are what the server would send."""

    def __init__(self, data: bytes, weights: dict[str, Tensor]) -> None:
        self.data, self.weights, self.epoch_starts = data, weights, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.start = StartingPoint(trainer, lambda: self.data)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for name, value in self.weights.items():
            if name == "weight":
                pl_module.weight.data.copy_(value)
            else:
                assert torch.equal(dict(pl_module.named_buffers(), frozen=pl_module.frozen)[name], value), name
        assert len(pl_module.queue) == (min(3, int(pl_module.seen)) if pl_module.grows else 0)
        assert pl_module.loaded == trainer.global_step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_newcomer_goes_on_as_who_has_been_there(case: str, tmp_path: Path) -> None:
    first = Granted(Others(seed=len(case)))
    model = fit(first, tmp_path / "first", **CASES[case])
    assert len(first.starts) >= 3
    ends = [Granted(others) for _, others, _, _ in first.starts]
    for (data, others, weights, seen), second in zip(first.starts, ends, strict=True):
        join = Join(data, weights)
        joined = fit(second, tmp_path / "second", callbacks=[join], **CASES[case])
        assert_equal(joined.trace, model.trace[seen:])
        assert others.plans == first.others.plans
        assert_equal(joined.state_dict(), model.state_dict())
        checkpoint = next(c for c in joined.trainer.callbacks if isinstance(c, ModelCheckpoint))
        assert checkpoint.dirpath == str(tmp_path / "first")
        assert not (tmp_path / "second").exists(), "it writes nothing"


@pytest.mark.parametrize("case", CASES)
def test_one_resumes_amid_an_epoch_without_a_word(case: str, tmp_path: Path) -> None:
    """Lightning would say that its loader cannot be resumed; it meets where the first run met, and nowhere else."""
    first = Granted(Others(seed=len(case)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fit(first, tmp_path, **CASES[case])
    paths = [path for path in tmp_path.glob("*.ckpt") if torch.load(path, weights_only=False)["batches"] is not None]
    assert paths
    for path in paths:
        again = Granted(Others(seed=1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = fit(again, tmp_path / "again", ckpt_path=path, **CASES[case])
        assert not [one for one in caught if "not resumable" in str(one.message)]
        step = torch.load(path, weights_only=False)["global_step"]
        assert resumed.trainer.global_step == model.trainer.global_step
        mine = [(plan.epoch, plan.steps - plan.until) for plan in again.others.plans]
        theirs = [(plan.epoch, plan.steps - plan.until) for plan in first.others.plans]
        assert mine == theirs[len(theirs) - len(mine) :], step
