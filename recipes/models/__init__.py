"""Networks of the papers, each an ``nn.Sequential`` of blocks that a pipeline can cut anywhere."""

from recipes.models.alexnet import alexnet_small
from recipes.models.digits import digits_cnn
from recipes.models.resnet import cifar_resnet, resnet

__all__ = ["alexnet_small", "cifar_resnet", "digits_cnn", "resnet"]
