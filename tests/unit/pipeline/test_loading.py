"""Which samples a rank loads: those of the plain Trainer, however early; and what two ranks compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from lightning_stale.private import of_lightning
from lightning_stale.strategies.same_batches import SameBatches
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.networks import Chain, batches


class Early(Chain):
    """Asks for the number of steps, which makes the training loader: in ``setup``, or for its schedule."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.steps, self.seen = where, 0.0, []

    def setup(self, stage: str) -> None:
        if self.where == "setup" and stage == "fit":
            self.steps = self.trainer.estimated_stepping_batches

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(float(batch[0].sum()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        if self.where != "setup":
            self.steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Module(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches(9)

    def val_dataloader(self) -> Any:
        return batches(3, seed=5)


def early(strategy: Any, where: str) -> Any:
    model, data = Early(where), Module()
    t = trainer(1, strategy, max_epochs=2)
    t.fit(model, datamodule=data)
    t.validate(model, datamodule=data, verbose=False)
    t.fit_loop.max_epochs = 3
    t.fit(model, datamodule=data)
    assert t._accelerator_connector.use_distributed_sampler, "it is the user's again"
    return model.seen, weights(model)


@pytest.mark.parametrize("where", ["setup", "configure_optimizers"])
def test_a_loader_that_is_made_early_is_not_shuffled(where: str) -> None:
    plain = early("auto", where)
    virtual = early(DSPStrategy(stages=3, staleness="bp"), where)
    assert virtual[0] == plain[0]
    assert_same(virtual[1], plain[1])
    assert plain[0][:9] == plain[0][9:18], "in the order of the dataset"


def test_the_users_choice_of_samplers_comes_back_after_a_failure() -> None:
    class Broken(Chain):
        def configure_optimizers(self) -> Any:
            raise ArithmeticError

    t = trainer(1, DSPStrategy(stages=2), max_epochs=1)
    with pytest.raises(ArithmeticError):
        t.fit(Broken(), batches(2))
    assert t._accelerator_connector.use_distributed_sampler
    assert "setup_data" not in vars(t.fit_loop)


# --- random numbers ---------------------------------------------------------------------------------------------------


class Coins(Chain):
    """Notes what a step draws, and what is drawn between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.between: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.between.append(float(torch.rand(())))


def coins(strategy: Any, folder: Path) -> Coins:
    """Train two epochs, resume after the first with new objects, and begin anew with new ones."""
    drawn = Coins()
    for path in (None, folder / "epoch=0-step=5.ckpt", None):
        model = Coins()
        saving = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
        t = trainer(1, strategy(), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
        if path is not None:
            torch.manual_seed(3)  # as a script that is run again does
        t.fit(model, batches(5, shuffle=True), ckpt_path=path, weights_only=False)
        drawn.steps += model.steps
        drawn.between += model.between
    assert len(drawn.steps) == len(drawn.between) == 25
    return drawn


def test_no_step_draws_what_another_has_drawn(tmp_path: Path) -> None:
    """Numbers that follow from a seed and the number of the batch go on over epochs, resumed runs and further ones."""
    torch.manual_seed(3)
    stale = coins(lambda: DSPStrategy(stages=2), tmp_path / "stale")
    assert stale.steps[10:15] == stale.steps[5:10], "resumed with the same seed: the epoch that would have followed"
    assert len(set(stale.steps)) == 20
    assert not set(stale.steps) & set(stale.between)
    torch.manual_seed(3)
    again = coins(lambda: DSPStrategy(stages=3), tmp_path / "again")
    assert again.steps == stale.steps
    assert again.between == stale.between


# --- two ranks --------------------------------------------------------------------------------------------------------


class Rank:
    """As much of a strategy as is asked; the other rank's words are those of rank 0."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.global_rank, self.root_device = rank, torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        return value


def compare(batches: list[Any], inputs: list[Any], draws: tuple[int, int] = (0, 0)) -> None:
    told = []
    for rank in (0, 1):
        alike = SameBatches(Rank(rank))  # type: ignore[arg-type]
        torch.manual_seed(0)
        torch.rand(draws[rank])
        alike.note_batch(batches[rank])
        told.append(alike.tell(inputs[rank]))
        if rank == 0:
            first = alike
    first.compare(*told, "batch 3 of epoch 0")


X, Y = torch.arange(12.0).view(4, 3), torch.arange(4)


def test_ranks_that_have_seen_the_same_go_on() -> None:
    compare([[X, Y]] * 2, [X] * 2)
    compare([[X, Y]] * 2, [X] * 2, draws=(1, 0))  # on one rank only, but the inputs are the same


@pytest.mark.parametrize(
    ("batches", "inputs", "draws", "cause"),
    [
        ([[X, Y], [X, Y.flip(0)]], [X, X], (0, 0), r"rank 0.*and rank 1.*read different samples in batch 3 of epoch 0"),
        ([[X, Y], [X.flip(0), Y]], [X, X], (0, 0), r"different: the values of \[0\] \(float32 \(4, 3\)\)"),
        (
            [[X, Y], [X, Y]],
            [X, X.flip(0)],
            (0, 0),
            r"computed different inputs .* in batch 3 .* the values of the",
        ),
    ],
)
def test_ranks_that_have_seen_something_else_are_told(batches: Any, inputs: Any, draws: Any, cause: str) -> None:
    with pytest.raises(MisconfigurationException, match=cause):
        compare(batches, inputs, draws=draws)


def test_a_gpu_is_asked_for_inputs_now_and_then_only_and_else_draws_decide() -> None:
    ranks = [SameBatches(Rank(rank)) for rank in (0, 1)]  # type: ignore[arg-type]
    noticed = []
    for batch in range(100):
        told = []
        for rank, alike in enumerate(ranks):
            alike._seldom = True
            alike.note_batch([X, Y])
            told.append(alike.tell(X.flip(0) if rank else X))
        try:
            ranks[0].compare(*told, "this batch")
        except MisconfigurationException:
            noticed.append(batch)
    assert noticed == [0, 1, 49, 99]
    torch.manual_seed(0)
    told = [ranks[0].tell(X)]
    torch.rand(1)
    told.append(ranks[1].tell(X))
    with pytest.raises(MisconfigurationException, match="have drawn different random numbers"):
        ranks[0].compare(*told, "this batch")


def test_workers_are_seeded_as_those_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(X)
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    for given in (None, pl_worker_init_function, partial(pl_worker_init_function, rank=1)):  # the last is Lightning's
        loader = DataLoader(data, worker_init_fn=given)
        undo = of_lightning.seed_workers_alike(loader)
        assert isinstance(loader.worker_init_fn, partial)
        assert loader.worker_init_fn.func is pl_worker_init_function
        assert loader.worker_init_fn.keywords == {"rank": 0}
        undo()
        assert loader.worker_init_fn is given
    own = DataLoader(data, worker_init_fn=print)
    of_lightning.seed_workers_alike(own)
    assert own.worker_init_fn is print
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    unseeded = DataLoader(data)
    of_lightning.seed_workers_alike(unseeded)
    assert unseeded.worker_init_fn is None
