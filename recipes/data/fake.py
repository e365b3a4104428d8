"""Random images of any shape, for dry runs and to measure speed."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from recipes.data.base import ImageDataModule, mix


class Fake(ImageDataModule):
    """Noise with random labels: nothing can be learned from it, and nothing is read from disk.

    Args:
        batch_size: images per batch and worker.
        samples: images to train on, and as many to measure with; all are in memory.
        num_classes: labels are in ``0..num_classes - 1``.
        channels: of the images.
        size: height and width of the images in pixels.
        num_workers: processes that read images, per worker.
        seed: of pixels, labels and order.

    Example::

        >>> from recipes.data import Fake
        >>> fake = Fake(batch_size=4, samples=8, num_classes=1000, size=224)
        >>> fake.setup("fit")
        >>> images, labels = next(iter(fake.train_dataloader()))
        >>> images.shape, images.dtype
        (torch.Size([4, 3, 224, 224]), torch.uint8)
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        samples: int = 1024,
        num_classes: int = 10,
        channels: int = 3,
        size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            mean=[0.5] * channels,
            std=[1 / 12**0.5] * channels,  # of a uniform distribution
        )
        self.samples, self.num_classes, self.shape = samples, num_classes, (channels, size, size)

    def load(self, train: bool) -> TensorDataset:
        generator = torch.Generator().manual_seed(mix(self.seed, train))
        images = torch.randint(256, (self.samples, *self.shape), dtype=torch.uint8, generator=generator)
        return TensorDataset(images, torch.randint(self.num_classes, (self.samples,), generator=generator))
