"""Whole models over real processes: traced, nested, on the meta device, in bf16; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from tests.integration.harness import run_workers
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.networks import GPT, Chain, ResNet, batches


class Model(L.LightningModule):
    """What the models below share."""

    def seeded(self) -> Any:
        torch.manual_seed(5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, -2), y.flatten())
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        output = self(x)
        self.log("val_loss", F.cross_entropy(output.flatten(0, -2), y.flatten()))
        self.log("val_accuracy", (output.argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Vision(Model):
    """A ResNet by names; the mean of the images is a buffer outside of it, read before it."""

    split = ["layer2", "layer3"]

    def __init__(self) -> None:
        super().__init__()
        self.seeded()
        self.net = ResNet()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.mean)

    def data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(30, 3, 8, 8, generator=generator), torch.arange(30) % 10)


class Text(Model):
    """A GPT by names: integers go in, the sequences of the batches differ in length."""

    split = ["h.1", "h.3"]

    def __init__(self) -> None:
        super().__init__()
        self.seeded()
        self.net = GPT()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def data(self) -> TensorDataset:
        tokens = torch.randint(11, (30, 7), generator=torch.Generator().manual_seed(1))
        return TensorDataset(tokens[:, :-1], tokens[:, 1:])


class Pair(nn.Module):
    """Takes and gives a dict with a tuple, integers, truth values and a tensor without gradient."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, state: Any) -> Any:
        if self.first:
            state = {"pair": (state, state + 1), "order": torch.arange(len(state)), "mask": state > 0, "idle": None}
        a, b = state["pair"]
        a = torch.relu_(self.one(a)) * state["mask"]
        b = self.norm(self.two(b))[state["order"].flip(0)]
        return a + b if self.last else {**state, "pair": (a, b), "idle": a * 2}


class Staged(Model):
    """Says itself what its stages are."""

    split = "params"

    def __init__(self) -> None:
        super().__init__()
        self.seeded()
        self.parts = nn.ModuleList(Pair(k == 0, k == 2) for k in range(3))

    def configure_stages(self) -> list[nn.Module]:
        return list(self.parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def data(self) -> TensorDataset:
        return TensorDataset(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 6)


class Meta(Model):
    """Built on the meta device."""

    split = "params"
    data = Staged.data

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.device("meta"):
                layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(5)]
                self.net = nn.Sequential(*layers, nn.Linear(6, 6))

    def init_weights(self) -> None:
        for module in self.net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Looking(Callback):
    """Notes what of the model a rank holds in memory when training begins."""

    held: set[str]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.held = {name for name, t in (*pl_module.named_parameters(), *pl_module.named_buffers()) if not t.is_meta}


def fit(rank: int, world_size: int, kind: str, stages: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    model = globals()[kind]()
    torch.manual_seed(9 if kind == "Meta" else 9 + rank)  # of its own, a rank would draw another order
    strategy = DSPStrategy(stages=stages, staleness=(3, 1, 0), split=model.split, gather="all")
    looking = Looking()
    saving = ModelCheckpoint(folder, filename=f"{kind}-{world_size}", every_n_epochs=2)
    t = trainer(
        world_size,
        strategy,
        max_epochs=2,
        val_check_interval=4,
        callbacks=[looking, saving],
        enable_checkpointing=True,
        **options,
    )
    data = model.data()
    t.fit(model, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=7))
    found = {
        "weights": weights(model),
        "held": looking.held,
        "metrics": dict(t.callback_metrics),
    }
    (found["validated"],) = t.validate(
        globals()[kind](), DataLoader(data, batch_size=7), saving.best_model_path, verbose=False
    )
    return found


def fit_each(rank: int, world_size: int, cases: list[Any], folder: str) -> list[dict[str, Any]]:
    return [fit(rank, world_size, kind, 3, folder, options) for kind, options in cases]


CASES: list[Any] = [("Vision", {}), ("Text", {}), ("Staged", {}), ("Meta", {}), ("Text", {"precision": "bf16-mixed"})]


def test_whole_models_train_as_with_virtual_stages(tmp_path: Path) -> None:
    """Shuffled, with a smaller last batch, batch norm, drains in the middle of an epoch, and validation."""
    ranks = run_workers(fit_each, 3, tmp_path / "ranks", 3, CASES, str(tmp_path))
    (virtual,) = run_workers(fit_each, 1, tmp_path / "virtual", 1, CASES, str(tmp_path))
    for number, (kind, options) in enumerate(CASES):
        alone = virtual[number]
        names = set().union(*(rank[number]["held"] for rank in ranks))
        assert names == alone["held"], kind
        constant = {"mean"} & names
        for rank in ranks:
            assert_same(rank[number]["weights"], alone["weights"])
            assert rank[number]["metrics"] == alone["metrics"], kind
            assert rank[number]["validated"] == alone["validated"], kind
            assert rank[number]["held"] >= constant
            assert sum(len(other[number]["held"] & rank[number]["held"] - constant) > 0 for other in ranks) == 1, kind
        assert alone["metrics"]["val_loss"] == alone["validated"]["val_loss"], (kind, options)
        fresh = globals()[kind]()
        assert not options or alone["weights"]["net.wte.weight"].dtype == torch.float32
        if kind != "Meta":
            assert any(not torch.equal(value, alone["weights"][name]) for name, value in weights(fresh).items())
        else:
            assert not any(value.isnan().any() for value in alone["weights"].values())


# --- what is refused --------------------------------------------------------------------------------------------------


class Twice(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).mean() + self.net(batch[0]).mean()


class Several(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD([self.scale], lr=0.1)]


class Synchronized(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.SyncBatchNorm(9))


class Before(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(self.stem(batch[0])).mean()


class Around(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net[0](batch[0]).mean()


class Nothing(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


class Across(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(self.net[0])


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9)
        self.head.weight = next(self.net[0].parameters())


class TwiceEvaluated(Chain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) + self.net(-batch[0])).mean())


class Outside(Chain):
    def on_validation_epoch_end(self) -> None:
        self.net(torch.ones(1, 6))


REFUSED: list[Any] = [
    ("Twice", {}, "the body was called twice in one training_step", "call it once, on the concatenated inputs"),
    ("Several", {}, "several optimizers cannot", "return one optimizer (with param groups)"),
    ("Synchronized", {}, "net.1 is a SyncBatchNorm", "plain BatchNorm"),
    ("Before", {}, "before the module that was cut has parameters to train", "make it part of that module"),
    ("Around", {}, "a step did not call self.net(...), the module that was cut", "DSPStrategy(module=...)"),
    ("Nothing", {}, "training_step returned None", "return a loss"),
    ("Across", {}, "blocks 0 and 1 share a parameter", "choose a split that keeps both in one block"),
    ("Tied", {}, "of block 0, and what lies outside of the blocks", "make it part of the module that is cut"),
]


def refuse(rank: int, world_size: int, kind: str, options: dict[str, Any]) -> str:
    model = globals()[kind]()
    t = trainer(world_size, DSPStrategy(stages=2 if world_size == 1 else None), max_epochs=1, **options)
    try:
        t.fit(model, batches(4), batches(3))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(("kind", "options", "cause", "cure"), REFUSED)
def test_what_cannot_work_is_refused_with_its_cause_and_cure(
    kind: str, options: dict[str, Any], cause: str, cure: str
) -> None:
    text = refuse(0, 1, kind, options)
    assert cause in text
    assert cure in text


def test_a_scaled_loss_is_refused() -> None:
    model, strategy = Chain(), DSPStrategy(stages=2)
    t = trainer(1, strategy, max_epochs=1)
    strategy.precision_plugin.scaler = object()  # what precision="16-mixed" has on a GPU
    with pytest.raises(Exception, match=r"precision='16-mixed' scales the loss.*write precision='bf16-mixed'"):
        t.fit(model, batches(4))


@pytest.mark.parametrize(
    ("kind", "cause"), [("Twice", "called twice"), ("TwiceEvaluated", "called twice"), ("Outside", "outside of a step")]
)
def test_on_ranks_a_second_call_ends_all_of_them(kind: str, cause: str, tmp_path: Path) -> None:
    texts = run_workers(refuse, 2, tmp_path, 2, kind, {})
    assert all(cause in text for text in texts)
    assert kind == "Outside" or "RunFailedError: rank 0 raised MisconfigurationException" in texts[1]
