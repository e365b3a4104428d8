"""Residual blocks: each takes and gives one tensor, and leaves the one it is given as it was.

No block writes into its input: a pipeline keeps what it has sent to a block, and runs the block on it again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Callable[[int, int, int], nn.Module]
"""Makes a shortcut from ``(channels_in, channels_out, stride)`` where the shapes of input and output differ."""


def conv_bn(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps height and width (over ``stride``), and its batch normalization."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class Padding(nn.Module):
    """A shortcut without parameters: every ``stride``-th pixel, and zeros for the channels that are new.

    Option A of He et al. 2015 (arXiv 1512.03385, section 4.1), which its CIFAR networks use (section 4.2).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Return a shortcut by a 1x1 convolution: option B of He et al. 2015, which its ImageNet networks use."""
    return conv_bn(channels_in, channels_out, 1, stride)


class _Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Sequential, shape: tuple[int, int, int], shortcut: Shortcut) -> None:
        super().__init__()
        channels_in, channels_out, stride = shape
        self.body = body
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Basic(_Residual):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, shortcut: Shortcut) -> None:
        body = nn.Sequential(conv_bn(channels_in, width, 3, stride), nn.ReLU(), conv_bn(width, width, 3))
        super().__init__(body, (channels_in, width, stride), shortcut)


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2015, figure 5 right); the stride is in the 3x3, as in torchvision."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, shortcut: Shortcut) -> None:
        channels_out = self.expansion * width
        body = nn.Sequential(
            conv_bn(channels_in, width, 1),
            nn.ReLU(),
            conv_bn(width, width, 3, stride),
            nn.ReLU(),
            conv_bn(width, channels_out, 1),
        )
        super().__init__(body, (channels_in, channels_out, stride), shortcut)


def initialise(model: nn.Sequential) -> nn.Sequential:
    """Draw the convolutions as He et al. do (arXiv 1502.01852, fan out); batch norm is 1 and 0 from the start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
