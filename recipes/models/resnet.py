"""Residual networks for CIFAR (6n+2 layers) and for ImageNet (18 to 152 layers): He et al. 2015, arXiv 1512.03385."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from recipes.models.blocks import Basic, Bottleneck, Padding, Shortcut, conv_bn, initialise, projection

IMAGENET: dict[int, tuple[type[Basic | Bottleneck], list[int]]] = {
    18: (Basic, [2, 2, 2, 2]),
    34: (Basic, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}
"""The block, and how many of it each group has, by depth (He et al. 2015, table 1)."""


def cifar_resnet(*, depth: int, num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Return the CIFAR network of ``depth = 6n+2`` layers: three groups of ``n`` basic blocks, 16, 32 and 64 wide.

    He et al. 2015, section 4.2, with its shortcuts without parameters. DSP's experiments (arXiv 1909.02625) have depths
    98 and 164: 98 is of this form only (n = 16), and 164 is here of the same form (n = 27); the bottlenecks of He et
    al. 2016, 9n+2 layers, would give 164 too.

    Args:
        depth: 20, 32, 44, 56, 98, 110, 164, ...
        num_classes: the number of outputs.
        channels: of the images.

    Raises:
        ValueError: for another depth, with the nearest ones.

    Example::

        >>> from recipes.models import cifar_resnet
        >>> sum(p.numel() for p in cifar_resnet(depth=20).parameters())
        269722
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth={depth} is not 6n+2: write e.g. depth={6 * max(n, 1) + 2} or {6 * max(n + 1, 2) + 2}")
    stem = nn.Sequential(conv_bn(channels, 16, 3), nn.ReLU())
    return _sequence(stem, Basic, 16, [n, n, n], Padding, num_classes)


def resnet(
    *, depth: int, num_classes: int = 1000, channels: int = 3, stem: Literal["imagenet", "cifar"] = "imagenet"
) -> nn.Sequential:
    """Return the ImageNet network of ``depth`` layers: four groups of blocks, 64, 128, 256 and 512 wide.

    He et al. 2015, section 3.3 and table 1; the numbers of parameters are torchvision's.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: the number of outputs.
        channels: of the images.
        stem: ``"imagenet"``, which makes 56x56 of 224x224, or ``"cifar"``, a 3x3 convolution that keeps 32x32.

    Raises:
        ValueError: for another depth or stem, with what to write.

    Example::

        >>> from recipes.models import resnet
        >>> sum(p.numel() for p in resnet(depth=18).parameters())
        11689512
    """
    if depth not in IMAGENET:
        raise ValueError(f"depth={depth}: write one of {', '.join(map(str, IMAGENET))}, or use cifar_resnet for 6n+2")
    if stem == "imagenet":
        start = nn.Sequential(conv_bn(channels, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    elif stem == "cifar":
        start = nn.Sequential(conv_bn(channels, 64, 3), nn.ReLU())
    else:
        raise ValueError(f"stem={stem!r}: write 'imagenet' or 'cifar'")
    block, counts = IMAGENET[depth]
    return _sequence(start, block, 64, counts, projection, num_classes)


def _sequence(
    stem: nn.Module,
    block: type[Basic | Bottleneck],
    width: int,
    counts: Sequence[int],
    shortcut: Shortcut,
    num_classes: int,
) -> nn.Sequential:
    """Return stem, groups of blocks, pool, flatten and linear; each group but the first halves the image first."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for group, count in enumerate(counts):
        for i in range(count):
            stride = 2 if group > 0 and i == 0 else 1
            layers[f"group{group + 1}_block{i + 1}"] = block(channels, width, stride, shortcut)
            channels = block.expansion * width
        width *= 2
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels, num_classes)
    return initialise(nn.Sequential(layers))
