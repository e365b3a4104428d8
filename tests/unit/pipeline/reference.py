"""The DSP trajectory, written once more from the paper and `algorithms.md`, without anything of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Reference:
    """Blocks, each with its own weights and optimizer, trained with layer-wise staleness ``m``.

    Args:
        blocks: copied.
        loss: of the last block's result and the target; a module, whose parameters are the last block's.
        m: the staleness of each block.
        optimizer: makes one from parameters.
        recompute: the backward sees the weights of its own time; ``False``: those of the forward.
        clip: changes a list of gradients, one block's.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        loss: nn.Module,
        m: Sequence[int],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        recompute: bool = True,
        clip: Callable[[list[Tensor]], None] = lambda _: None,
    ) -> None:
        self.blocks = [copy.deepcopy(block) for block in blocks]
        self.loss, self.m, self.recompute, self.clip = copy.deepcopy(loss), tuple(m), recompute, clip
        self.owned = [list(block.parameters()) for block in self.blocks]
        self.owned[-1] += list(self.loss.parameters())
        self.optimizers = [optimizer(parameters) for parameters in self.owned]

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train on ``batches`` from an empty pipeline to an empty one."""
        last = len(self.blocks) - 1
        features: list[dict[int, Tensor]] = [{} for _ in self.blocks]  # [k][n]: the input of block k for batch n
        gradients: list[dict[int, Tensor]] = [{} for _ in self.blocks]  # [k][n]: of the result of block k
        old: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.blocks]  # [k][n]: the weights of the forward
        targets: list[Tensor] = []

        def forward(k: int, n: int) -> None:
            old[k][n] = {name: p.detach().clone() for name, p in self.blocks[k].named_parameters()}
            if k < last:
                with torch.no_grad():
                    features[k + 1][n] = self.blocks[k](features[k][n])

        def backward(k: int, j: int) -> None:
            now = dict(self.blocks[k].named_parameters())
            weights = now if self.recompute else {name: v.requires_grad_() for name, v in old[k].pop(j).items()}
            h = features[k].pop(j).clone().requires_grad_()
            z = functional_call(self.blocks[k], weights, (h,))
            wanted = [h, *weights.values()]
            if k == last:
                loss = self.loss(z, targets[j])
                dh, *dw = torch.autograd.grad(loss, [*wanted, *self.loss.parameters()])
            else:
                dh, *dw = torch.autograd.grad(z, wanted, gradients[k].pop(j))
            if k > 0:
                gradients[k - 1][j] = dh
            self.clip(dw)
            for parameter, gradient in zip(self.owned[k], dw, strict=True):
                parameter.grad = gradient
            self.optimizers[k].step()

        n = -1
        for n, (x, y) in enumerate(batches):
            features[0][n] = x
            targets.append(y)
            for k in range(len(self.blocks)):
                forward(k, n)
            for k in reversed(range(len(self.blocks))):
                if n >= self.m[k]:
                    backward(k, n - self.m[k])
        for k in reversed(range(len(self.blocks))):  # drain
            for j in range(max(0, n + 1 - self.m[k]), n + 1):
                backward(k, j)

    def weights(self) -> list[Tensor]:
        """Return the parameters, block after block, those of the loss last."""
        return [parameter.detach() for owned in self.owned for parameter in owned]


class ChainLoss(nn.Module):
    """What :class:`~tests.unit.pipeline.networks.Chain` does after its body."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.scale * output, target)


def of_chain(chain: Any, starts: Sequence[int], m: Sequence[int], **kwargs: Any) -> Reference:
    """Return the reference for an untrained :class:`~tests.unit.pipeline.networks.Chain`, cut at ``starts``."""
    layers = list(chain.net)
    bounds = [0, *starts, len(layers)]
    blocks = [nn.Sequential(*layers[a:b]) for a, b in pairwise(bounds)]
    make = getattr(torch.optim, chain.optimizer_name)
    return Reference(blocks, ChainLoss(), m, lambda parameters: make(parameters, **chain.options), **kwargs)


def distance(chain: Any, reference: Reference) -> float:
    """Return the largest difference between the weights of a trained chain and the reference."""
    pairs = zip([*chain.net.parameters(), chain.scale], reference.weights(), strict=True)
    return max(float((a.detach() - b).abs().max()) for a, b in pairs)
