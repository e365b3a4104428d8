"""The downsized AlexNet of DSSP's experiments: three convolutions, two dense layers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from recipes.models.blocks import initialise


def alexnet_small(*, num_classes: int = 10, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Return three 5x5 convolutions, each with a pooling that halves the image, and two dense layers.

    DSSP (arXiv 1908.11848) names the kind and number of its layers, and no widths. These are those of Krizhevsky's own
    small network for CIFAR-10 (cuda-convnet's ``layers-80sec``, Caffe's ``cifar10_quick``), with a ReLU between the
    dense layers as AlexNet has it: 145,578 parameters for 10 classes.

    Args:
        num_classes: the number of outputs.
        channels: of the images.
        size: height and width of the images in pixels.

    Example::

        >>> from recipes.models import alexnet_small
        >>> sum(p.numel() for p in alexnet_small().parameters())
        145578
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 32, 5, padding=2),
        pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 32, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.AvgPool2d(3, stride=2, ceil_mode=True),
        conv3=nn.Conv2d(32, 64, 5, padding=2),
        relu3=nn.ReLU(),
        pool3=nn.AvgPool2d(3, stride=2, ceil_mode=True),
        flatten=nn.Flatten(),
    )
    with torch.no_grad():
        features = nn.Sequential(layers)(torch.zeros(1, channels, size, size)).shape[1]
    layers["linear1"] = nn.Linear(features, 64)
    layers["relu4"] = nn.ReLU()
    layers["linear2"] = nn.Linear(64, num_classes)
    return initialise(nn.Sequential(layers))
