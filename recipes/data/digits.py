"""Handwritten digits that come with scikit-learn: nothing to download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

from recipes.data.base import ImageDataModule


class Digits(ImageDataModule):
    """1437 training and 360 test images, (1, 8, 8) in 0..1, in ten classes.

    Args:
        batch_size: images per batch and worker.
        num_workers: processes that read images, per worker.
        seed: of the order, and of which images are for the test.

    Example::

        >>> from recipes.data import Digits
        >>> digits = Digits(batch_size=16)
        >>> digits.setup("fit")
        >>> images, labels = next(iter(digits.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([16, 1, 8, 8]), torch.Size([16]))
    """

    def __init__(self, *, batch_size: int = 16, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)

    def load(self, train: bool) -> TensorDataset:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        splits = train_test_split(range(len(labels)), test_size=360, random_state=self.seed, stratify=labels)
        rows = splits[0] if train else splits[1]
        return TensorDataset(images[rows], labels[rows])
