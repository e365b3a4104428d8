"""Forwards as people write them, each of which a pipeline could train wrongly without a word.

Each network is a chain of blocks under ``net.0``, ``net.1``, ``net.2``, which is cut between them as an
``nn.Sequential`` or traced. What draws random numbers seeds them itself, so that all ways of training draw the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

WIDTH, LENGTH = 8, 5


class Dropout(nn.Module):
    """``F.dropout(x, p, self.training)``, as nanoGPT, torchvision's DenseNet and MobileNetV3 of timm write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return x + F.dropout(torch.tanh(self.linear(x)), 0.4, self.training)


class CausalAttention(nn.Module):
    """nanoGPT's, with the kernel that takes the probability of dropout as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.dropout = nn.LayerNorm(WIDTH), 0.3
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(2)
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, 2, width // 2).transpose(1, 2)
            for part in self.c_attn(self.ln(x)).split(width, dim=2)
        )
        p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return x + self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class DropPath(nn.Module):
    """timm's."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
        return x * mask.div_(0.5)


class ViTBlock(nn.Module):
    """timm's, with LayerScale: one drop path held under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.gamma = nn.Parameter(0.1 * torch.ones(WIDTH))
        self.drop_path1 = self.drop_path2 = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        x = x + self.drop_path1(self.gamma * self.mlp(self.norm1(x)))
        return x + self.drop_path2(self.mlp(x))


class Twice(nn.Module):
    """Holds one module under two names, and a parameter under two."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = self.one
        self.three = nn.Linear(WIDTH, WIDTH)
        self.three.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.three(torch.tanh(self.two(self.one(x)))))


class Normed(nn.Module):
    """Batch norm, with an in-place activation first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(LENGTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, 0.3, inplace=True)
        x = self.linear(self.norm(x))
        x += 1
        return x


class Spectrum(nn.Module):
    """FNet's and FNO's: complex features leave the block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.real if x.is_complex() else x
        return torch.fft.fft(torch.tanh(self.linear(x)))


class FromSpectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 0.5 + 0.5j))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(x * self.weight).real


class ConvNeXt(nn.Module):
    """timm's block on channels_last features; the first brings rows there."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.conv_dw, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 4).contiguous(memory_format=torch.channels_last)
        assert x.is_contiguous(memory_format=torch.channels_last)
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        return x + self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1).transpose(1, 2)


class Recurrent(nn.Module):
    """nn.LSTM holds its weights in a list of its own as well; its result is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.lstm(x[0] if isinstance(x, tuple) and not isinstance(x, PackedSequence) else x)


class First(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0]


class Pack(nn.Module):
    """Sequences of unequal length: a PackedSequence goes on."""

    def forward(self, x: Tensor) -> PackedSequence:
        lengths = [LENGTH - n % 3 for n in range(len(x))]
        return nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


class Unpack(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return pad_packed_sequence(x[0], batch_first=True)[0]


class Checkpointed(nn.Module):
    """Runs a part again in its own backward, as Hugging Face's ``gradient_checkpointing_enable()`` does."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, x + 0 * self.mlp[0].bias, use_reentrant=self.reentrant)


class _Noted(torch.autograd.Function):
    """Keeps its weight without telling autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.weight.t(), ctx.x.flatten(0, 1).t() @ gradient.flatten(0, 1)


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _Noted.apply(torch.tanh(x), self.weight)


class Listed(nn.Module):
    """Reaches its parameters through a list of its own, and under views."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))
        self.listed = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.listed[0].t()) * self.listed[0].view(-1)[:WIDTH]


class Normalized(nn.Module):
    """Parametrized weights, one of them with buffers that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.two = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Renormed(nn.Module):
    """A forward that changes its own weights, as ``Embedding(max_norm=...)`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LENGTH, WIDTH, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(LENGTH))


class Masked(nn.Module):
    """Attention with a mask that is passed on, which needs no gradient though it is of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, given: Any) -> Any:
        x, mask = given if isinstance(given, tuple) else (given, padding(given))
        assert not mask.requires_grad
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask


def padding(x: Tensor) -> Tensor:
    """Return an additive mask, the same for all rows: expanded, as Hugging Face makes it."""
    mask = torch.zeros(1, LENGTH)
    mask[0, -2:] = -1e9
    return mask.expand(len(x), LENGTH, LENGTH)


def chain(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks)


class Case(NamedTuple):
    """A network, and where its second and third block start."""

    make: Callable[[], nn.Sequential]
    split: tuple[Any, Any] = (1, 2)


def three(kind: Callable[[], nn.Module]) -> Callable[[], nn.Sequential]:
    """Return what makes a chain of three of a kind."""
    return lambda: chain(kind(), kind(), kind())


CASES: dict[str, Case] = {
    "dropout": Case(three(Dropout)),
    "attention": Case(three(CausalAttention)),
    "drop path": Case(three(ViTBlock)),
    "twice": Case(three(Twice)),
    "batch norm, in place": Case(three(Normed)),
    "complex": Case(lambda: chain(Spectrum(), Spectrum(), FromSpectrum())),
    "channels_last": Case(lambda: chain(ConvNeXt(first=True), ConvNeXt(), ConvNeXt(), Pool())),
    "lstm": Case(lambda: chain(Recurrent(), Recurrent(), Recurrent(), First())),
    "packed": Case(lambda: chain(Pack(), Recurrent(), Recurrent(), Unpack(), nn.Linear(WIDTH, WIDTH)), (2, 3)),
    "checkpoint": Case(three(lambda: Checkpointed(reentrant=False))),
    "reentrant checkpoint": Case(three(lambda: Checkpointed(reentrant=True))),
    "noted": Case(three(Noted)),
    "listed": Case(three(Listed)),
    "parametrized": Case(three(Normalized)),
    "max_norm": Case(three(Renormed)),
    "mask": Case(lambda: chain(Masked(), Masked(), Masked(), First())),
    "frozen": Case(lambda: chain(Twice().requires_grad_(False), Twice(), Twice())),
    "compiled": Case(lambda: chain(*(torch.compile(Twice(), backend="aot_eager") for _ in range(3)))),
}


class Traced(nn.Module):
    """Calls the blocks of a case from a forward of its own, which asks for ``self.training`` too."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(net)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return F.dropout(x, 0.0, self.training)


class Model(L.LightningModule):
    """Trains the network of a case."""

    def __init__(self, case: str, optimizer: str = "SGD", traced: bool = False) -> None:
        super().__init__()
        self.optimizer_name = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(11)
            net = CASES[case].make()
        self.net = Traced(net) if traced else net
        self.evaluated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(float(self.net(batch).square().sum()))

    def configure_optimizers(self) -> Any:
        options = {"SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "Adam": {"lr": 0.01}}
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), **options[self.optimizer_name])


def rows(count: int, seed: int = 0) -> list[Tensor]:
    """Return batches of three."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, LENGTH, WIDTH, generator=generator) for _ in range(count)]


def loader(count: int, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of :func:`rows`: of copies, since some forwards change their input in place."""
    return DataLoader(rows(count, seed), batch_size=None, collate_fn=torch.clone)  # type: ignore[arg-type]


class Snapshots:
    """DSP without recompute, once more: every forward runs on a copy of its block, which is then kept for its backward.

    Args:
        blocks: copied.
        m: the staleness of each block.
    """

    def __init__(self, blocks: list[nn.Module], m: tuple[int, ...]) -> None:
        self.blocks, self.m = copy.deepcopy(blocks), m
        self.optimizers = [
            torch.optim.SGD([p for p in block.parameters() if p.requires_grad] or [torch.zeros(())], lr=0.1)
            for block in self.blocks
        ]

    def train(self, data: list[Tensor]) -> None:
        """Train from an empty pipeline to an empty one."""
        kept: list[list[Any]] = [[] for _ in self.blocks]  # (block, leaves of the input, results), oldest first
        waiting: list[list[Any]] = [[] for _ in self.blocks]  # gradients of the results
        last = len(self.blocks) - 1

        def forward(x: Any) -> None:
            for k, block in enumerate(self.blocks):
                leaves: list[Tensor] = []
                twin = copy.deepcopy(block)
                y = twin(_with_leaves(x, leaves))
                for now, then in zip(_state(block), _state(twin), strict=True):  # a forward may change both
                    now.data.copy_(then.data)
                kept[k].append((twin, leaves, _wanting(y)))
                x = y
            waiting[last].append(None)

        def backward(k: int) -> None:
            twin, leaves, results = kept[k].pop(0)
            gradients = waiting[k].pop(0)
            if k == last:
                results[0].square().mean().backward()
            else:
                pairs = [(y, dy) for y, dy in zip(results, gradients, strict=True) if dy is not None]
                torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
            if k > 0:
                waiting[k - 1].append([leaf.grad for leaf in leaves])
            for now, then in zip(self.blocks[k].parameters(), twin.parameters(), strict=True):
                now.grad = then.grad
            self.optimizers[k].step()

        for n, x in enumerate(data):
            forward(x)
            for k in reversed(range(len(self.blocks))):
                if n >= self.m[k]:
                    backward(k)
        for k in reversed(range(len(self.blocks))):
            while kept[k]:
                backward(k)


def _with_leaves(x: Any, leaves: list[Tensor]) -> Any:
    if isinstance(x, Tensor):
        leaf = x.detach().clone().requires_grad_(x.requires_grad)
        if x.requires_grad:
            leaves.append(leaf)
        return leaf.clone()  # which may be changed in place
    if isinstance(x, tuple):
        found = [_with_leaves(value, leaves) for value in x]
        return type(x)(*found) if hasattr(x, "_fields") else tuple(found)
    return x


def _wanting(y: Any) -> list[Tensor]:
    if isinstance(y, Tensor):
        return [y] if y.requires_grad else []
    return [tensor for value in y for tensor in _wanting(value)] if isinstance(y, tuple) else []


def _state(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]
