"""Networks and LightningModules that the pipeline's tests cut, importable by every worker process."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision writes it: the forward is not an nn.Sequential's."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Residual(width, width), Residual(width, width))
        self.layer2 = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 2 * width))
        self.layer3 = nn.Sequential(Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


class Attention(nn.Module):
    """Causal, as nanoGPT writes it, with a mask in a buffer."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q = q.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        k = k.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        weights = weights.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        weights = F.dropout(F.softmax(weights, dim=-1), self.dropout, self.training)
        y = (weights @ v).transpose(1, 2).contiguous().view(batch, length, width)
        return self.c_proj(y)


class Layer(nn.Module):
    """One block of the transformer."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, length, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embedding, blocks, head; the loss only where targets are given, as nanoGPT does."""

    def __init__(self, vocabulary: int = 11, length: int = 6, width: int = 8, depth: int = 4, dropout: float = 0.0):
        super().__init__()
        self.length = length
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([Layer(width, 2, length, dropout) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        positions = torch.arange(0, tokens.size(1), dtype=torch.long, device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for layer in self.h:
            x = layer(x)
        logits = self.head(self.ln_f(x))
        if targets is not None:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits


class Skips(nn.Module):
    """A small U-Net: values pass over one cut and over two."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.middle, self.up2, self.up1 = nn.Linear(6, 6), nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.tanh(self.down1(x))
        two = torch.tanh(self.down2(one))
        deep = torch.tanh(self.middle(two))
        up = torch.tanh(self.up2(torch.cat([deep, two], 1)))
        return self.up1(torch.cat([up, one], 1))


class Branching(nn.Module):
    """Cannot be traced: its forward asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else self.two(x)


class Delay(nn.Module):
    """Sleeps for a random time in forward and in backward; computes nothing."""

    def __init__(self, seed: int, longest_s: float) -> None:
        super().__init__()
        self._random, self._longest_s = random.Random(seed), longest_s

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self._random.uniform(0, self._longest_s))
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda _: time.sleep(self._random.uniform(0, self._longest_s)))
        return x


def samples(count: int, seed: int = 0) -> TensorDataset:
    """Return (count, 6) inputs and (count, 3) targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, torch.sin(x @ torch.randn(6, 3, generator=generator)))


def batches(count: int, size: int = 4, seed: int = 0, **kwargs: Any) -> DataLoader[Any]:
    """Return a loader of ``count`` batches of :func:`samples`."""
    return DataLoader(samples(count * size, seed), batch_size=size, **kwargs)


class Chain(L.LightningModule):
    """Seven layers in an ``nn.Sequential``, each of another width, and a scale outside of it."""

    def __init__(
        self,
        optimizer: str = "SGD",
        *,
        schedulers: bool = False,
        delay_s: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer_name, self.schedulers = optimizer, schedulers
        self.options = options or {"lr": 0.05, "momentum": 0.9}
        widths = [6, 9, 8, 7, 8, 9, 6, 3]
        with torch.random.fork_rng():
            torch.manual_seed(11)
            layers: list[nn.Module] = []
            for i, (a, b) in enumerate(pairwise(widths)):
                last = i == len(widths) - 2
                wait = [Delay(100 * seed + i, delay_s)] if delay_s else []
                layers.append(nn.Sequential(nn.Linear(a, b), *([] if last else [nn.Tanh()]), *wait))
            self.net = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.scale * output, target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", self.loss(self.net(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale * self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.optimizer_name)(self.parameters(), **self.options)
        if not self.schedulers:
            return optimizer
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.8)
        by_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]
