"""Features and targets of a sample stay together, and every random number is drawn as one process draws it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_stale import DSPStrategy
from tests.integration.harness import free_port, run_workers
from tests.integration.models import assert_same, trainer, weights

SAMPLES, BATCH = 48, 6


class Marked(Dataset[Any]):
    """The target of each sample is in its features; ``augmented``: at random, in the process that loads it."""

    def __init__(self, augmented: bool = False) -> None:
        self.x = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(1))
        self.augmented = augmented

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index].clone()
        if self.augmented:
            x = x * (1 + torch.rand(()) * random.random() * np.random.rand()).float()
        return torch.cat([torch.full((1,), float(index)), x]), torch.full((1,), float(index))


class Carry(nn.Module):
    """A residual layer with dropout, that a coin tossed by each generator skips (LayerDrop), and passes the mark on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        mark, x = x[:, :1], x[:, 1:]
        keep = random.random() < 0.7, np.random.rand() < 0.7, bool(torch.rand(()) < 0.7)
        if not self.training or any(keep):
            x = x + F.dropout(torch.tanh(self.norm(self.layer(x))), 0.3, self.training)
        return torch.cat([mark, x * (1 + 0.1 * sum(keep))], 1)


class Mixing(L.LightningModule):
    """Mixes up in ``training_step``, with all generators, and sees to it that targets are those of the features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(*(Carry() for _ in range(4)))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        order = torch.randperm(len(x), device=x.device)
        part = float(np.random.beta(0.4, 0.4)) * random.uniform(0.5, 1.0)
        x, y = part * x + (1 - part) * x[order], part * y + (1 - part) * y[order]
        out = self.net(x)
        if not torch.equal(out[:, :1], y):
            raise AssertionError(f"features of {out[:, 0].tolist()} with the targets of {y[:, 0].tolist()}")
        return F.mse_loss(out[:, 1:].sum(1), torch.rand(len(x))) + out[:, 1:].square().mean()  # a random target

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.paired(*batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.paired(*batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.paired(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OnOneRank(Callback):
    """Draws where one rank only comes along, as a logger of random images does."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            torch.rand(3), random.random(), np.random.rand()

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.on_train_batch_end(trainer)


def fit(world_size: int, strategy: Any, model: L.LightningModule, data: Any, **options: Any) -> dict[str, Any]:
    strategy = DSPStrategy(**strategy, gather="all") if isinstance(strategy, dict) else strategy
    t = trainer(world_size, strategy, **{"max_epochs": 2, **options})
    L.seed_everything(7, workers=True, verbose=False)  # as Lightning does under DDP's kind
    t.fit(model, data, DataLoader(Marked(), batch_size=BATCH) if data is not None else None)
    return {"weights": weights(model), "metrics": {name: float(v) for name, v in t.callback_metrics.items()}}


def loader(augmented: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(Marked(augmented), **{"batch_size": BATCH, "shuffle": True, **options})


def one_stream(rank: int, world_size: int, strategy: Any) -> list[dict[str, Any]]:
    """Draw in the main process, in workers, in every step, in every block, in validation, and on one rank only."""
    one_rank = {"callbacks": [OnOneRank()], "val_check_interval": 3}
    generator = torch.Generator().manual_seed(5)
    return [
        fit(world_size, strategy, Mixing(), loader(), **one_rank),
        fit(world_size, strategy, Mixing(), loader(num_workers=1, generator=generator), accumulate_grad_batches=3),
    ]


def test_back_propagation_draws_what_the_plain_trainer_draws(tmp_path: Path) -> None:
    (plain,) = run_workers(one_stream, 1, tmp_path / "plain", 1, "auto")
    (virtual,) = run_workers(one_stream, 1, tmp_path / "virtual", 1, {"stages": 2, "staleness": "bp"})
    ranks = run_workers(one_stream, 2, tmp_path / "ranks", 2, {"staleness": "bp"})
    for number, run in enumerate(plain):
        assert_same(virtual[number]["weights"], run["weights"])
        assert virtual[number]["metrics"] == run["metrics"]
        for rank in ranks:
            assert_same(rank[number]["weights"], run["weights"])
            assert rank[number]["metrics"] == run["metrics"]


class InTransfer(Mixing):
    """Mixes up where the batch has been moved to the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        order = torch.randperm(len(x))
        return x[order] * 0.25 + x * 0.75, y[order] * 0.25 + y * 0.75


class Named(Mixing):
    """Several loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.paired(*(torch.cat(parts) for parts in zip(batch["one"], batch["other"], strict=True)))


class Noisy(Mixing):
    """Adds noise to its gradients."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.01)


def mix(samples: list[Any]) -> Any:
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    order = np.random.permutation(len(x))
    return x * 0.5 + x[order] * 0.5, y * 0.5 + y[order] * 0.5


class Shards(IterableDataset[Any]):
    """Splits by the worker, and by ``rank`` as well if it is given; ends before ``end``."""

    def __init__(self, rank: int = 0, ranks: int = 1, end: int = SAMPLES, augmented: bool = True) -> None:
        self.rank, self.ranks, self.end, self.augmented = rank, ranks, end, augmented

    def __iter__(self) -> Iterator[Any]:
        info, data = get_worker_info(), Marked(self.augmented)
        start, step = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(start * self.ranks + self.rank, self.end, step * self.ranks):
            yield data[index]


def stale_cases() -> list[Any]:
    """Return (model, loader, options)."""
    both = {"one": loader(), "other": loader(batch_size=3, shuffle=False)}
    return [
        (Mixing(), loader(), {"val_check_interval": 3}),
        (Mixing(), loader(False), {"callbacks": [OnOneRank()]}),
        (InTransfer(), loader(False, num_workers=1, collate_fn=mix), {"accumulate_grad_batches": 2}),
        (Named(), both, {"max_epochs": 1}),
        (Mixing(), DataLoader(Shards(), batch_size=BATCH, num_workers=2), {"val_check_interval": 3}),
    ]


def stale(rank: int, world_size: int, recompute: bool) -> list[dict[str, Any]]:
    strategy = {"stages": 2, "staleness": (2, 0), "recompute": recompute}
    found = []
    for model, data, options in stale_cases():
        found.append(fit(world_size, strategy, model, data, **options))
        if world_size > 1:
            assert not any(p.is_meta for p in model.parameters())
    if world_size > 1:  # its own numbers on every rank: no other run is the same
        fit(world_size, strategy, Noisy(), loader())
    return found


@pytest.mark.parametrize("recompute", [True, False])
def test_stale_stages_over_processes_draw_what_virtual_ones_draw(recompute: bool, tmp_path: Path) -> None:
    (virtual,) = run_workers(stale, 1, tmp_path / "virtual", 1, recompute)
    ranks = run_workers(stale, 2, tmp_path / "ranks", 2, recompute)
    for number, run in enumerate(virtual):
        for rank in ranks:
            assert_same(rank[number]["weights"], run["weights"])
            assert rank[number]["metrics"] == run["metrics"]


# --- what differs between the ranks -----------------------------------------------------------------------------------


class OwnGenerator(Mixing):
    """Draws from a generator that every rank seeds in its own way."""

    def on_fit_start(self) -> None:
        self.generator = np.random.default_rng(self.trainer.global_rank)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        order = torch.from_numpy(self.generator.permutation(len(x)))
        return super().paired(x[order], y[order])


ONES = "the loaders of neighbouring stages end differently", "yield the same batches on every rank"
DIFFERENT: list[Any] = [
    ("fit", "shards", 2, "read different samples in batch 0 of epoch 0", "Split an IterableDataset by torch.utils"),
    ("fit", "OwnGenerator", 0, "computed different inputs of the module that was cut", "seed those of your own alike"),
    ("validate", "shards", 0, "read different samples in batch 0 of the evaluation", "yield the same samples on every"),
    *((fn, kind, 0, *ONES) for fn in ("fit", "bp", "validate") for kind in ("less on 0", "less on 1")),
]


def differ(rank: int, world_size: int, ports: list[int]) -> list[str]:
    texts = []
    for (fn, kind, num_workers, _, _), port in zip(DIFFERENT, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        t = trainer(world_size, DSPStrategy(staleness="bp" if fn == "bp" else (2, 0)), max_epochs=1)
        data = Shards(rank, world_size) if kind == "shards" else Shards(augmented=False)
        data = Shards(end=3 * BATCH, augmented=False) if kind == f"less on {rank}" else data
        try:
            run = t.fit if fn == "bp" else getattr(t, fn)
            run(globals().get(kind, Mixing)(), DataLoader(data, BATCH, num_workers=num_workers))
            texts.append("nothing")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
        dist.destroy_process_group()  # what has failed is not used again
    return texts


def test_samples_that_differ_by_rank_are_an_error_with_the_cure(tmp_path: Path) -> None:
    ranks = run_workers(differ, 2, tmp_path, 2, [free_port() for _ in DIFFERENT])
    for (fn, kind, _, cause, cure), *texts in zip(DIFFERENT, *ranks, strict=True):
        first, other = sorted(texts, key=lambda text: text.startswith("RunFailedError"))
        assert first.startswith(("MisconfigurationException", "ChannelError")), (fn, kind, texts)
        assert cause in first
        assert cure in first
        assert other.startswith(("RunFailedError: rank", "ChannelError")), (fn, kind, texts)
