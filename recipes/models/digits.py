"""A small convolutional network for 8x8 digits."""

from __future__ import annotations

from torch import nn


def digits_cnn(*, num_classes: int = 10, channels: int = 1, size: int = 8) -> nn.Sequential:
    """Return two convolutions and two dense layers, 38,282 parameters for the digits.

    Args:
        num_classes: the number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Example::

        >>> import torch
        >>> from recipes.models import digits_cnn
        >>> digits_cnn()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 2) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )
