"""Images and their classes, as LightningDataModules."""

from recipes.data.cifar import CIFAR
from recipes.data.digits import Digits
from recipes.data.fake import Fake
from recipes.data.imagenet import ImageNet

__all__ = ["CIFAR", "Digits", "Fake", "ImageNet"]
