"""Small models and data for the tests, importable by every worker process."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def trainer(world_size: int, strategy: Any, **kwargs: Any) -> L.Trainer:
    """Return a quiet Trainer."""
    return L.Trainer(**{**TRAINER, "devices": world_size, "strategy": strategy, **kwargs})


def regression_data(samples: int = 256, seed: int = 0) -> TensorDataset:
    """Return (samples, 8) inputs and (samples, 1) targets of a noisy linear function."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    y = x.sum(1, keepdim=True) / 3 + 0.1 * torch.randn(samples, 1, generator=generator)
    return TensorDataset(x, y)


def loader(samples: int = 256, batch_size: int = 8, seed: int = 0, **kwargs: Any) -> DataLoader[Any]:
    """Return an unshuffled loader over :func:`regression_data`."""
    return DataLoader(regression_data(samples, seed), batch_size=batch_size, **kwargs)


class Regression(L.LightningModule):
    """A two-layer network on :func:`regression_data`."""

    def __init__(self, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__()
        self.optimizer_name = optimizer
        self.options = options or {"lr": 0.05}
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), **self.options)


class Linear(L.LightningModule):
    """A loss that is linear in the weights: every gradient is exactly one, whatever the weights."""

    def __init__(self, lr: float = 2.0**-10) -> None:
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(torch.zeros(5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum() + 0.0 * batch[0].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Ledger(L.LightningModule):
    """A loss that is linear in the weights, with a page per sample that tells how often its gradient was applied.

    The gradient of every batch is :attr:`slope` in ``weight``, and one in ``pages[i]`` for each sample ``i`` of it.
    With SGD, a learning rate that is a power of two and small integers, all sums are exact in any order.
    """

    lr = 2.0**-10
    slope = torch.tensor([1.0, -2.0, 3.0, 5.0, -7.0])

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(5.0))
        self.pages = nn.Parameter(torch.zeros(samples))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight @ self.slope + self.pages[batch[0]].sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("page", self.pages[batch[0]].mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def numbered(samples: Any, batch_size: int = 2) -> DataLoader[Any]:
    """Return an unshuffled loader of sample numbers, for :class:`Ledger`."""
    return DataLoader(TensorDataset(torch.as_tensor(samples)), batch_size=batch_size)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict, as numpy-free plain tensors that pickle well."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 0.0) -> None:
    """Assert that two state dicts are equal: bit for bit, or within ``atol``."""
    assert left.keys() == right.keys()
    for name in left:
        if atol == 0.0:
            assert torch.equal(left[name], right[name]), f"{name}: {left[name]} != {right[name]}"
        else:
            torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Assert that two nested structures are equal, the tensors in them bit for bit and of the same type."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor), where
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), f"{where}: {left} != {right}"
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert type(left) is type(right), where
        assert len(left) == len(right), where
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}[{place}]")
    else:
        assert left == right, f"{where}: {left} != {right}"
