"""CIFAR-10 and CIFAR-100 from the Hugging Face hub, or from a folder of parquet files."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip
from torch.utils.data import TensorDataset

from recipes.data import hub
from recipes.data.base import ImageDataModule

SIZE = 32


class Source(NamedTuple):
    """Where a CIFAR is on the hub, which column has its labels, and mean and deviation of its training images."""

    repository: str
    label: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


SOURCES = {
    "cifar10": Source("uoft-cs/cifar10", "label", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Source("uoft-cs/cifar100", "fine_label", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CIFAR(ImageDataModule):
    """50,000 training and 10,000 test images, 32x32 in colour (Krizhevsky, 2009).

    Training images are padded by 4 pixels, cropped back to 32x32 at random and flipped at random (He et al. 2015,
    section 4.2). As in the papers, what is measured during training is the accuracy on the test images: there is no
    third split, so choose nothing by it that you report with it.

    The images are decoded once, and kept beside the data set in the cache of Hugging Face ``datasets``.

    Args:
        name: ``"cifar10"`` or ``"cifar100"`` (the 100 fine labels).
        batch_size: images per batch and worker.
        root: a folder with ``train-*.parquet`` and ``test-*.parquet`` (at any depth); ``None`` reads from the hub.
        augment: whether to crop and flip.
        num_workers: processes that read images, per worker; the images are in memory, so 0 is seldom slower.
        seed: of order and augmentation.

    Raises:
        FileNotFoundError: if there are no such files under ``root``, with the command that downloads them.
        ValueError: for another name, or if ``root`` holds several data sets.

    Example::

        >>> from recipes.data import CIFAR
        >>> CIFAR(name="cifar10", batch_size=128).source.repository
        'uoft-cs/cifar10'
    """

    def __init__(
        self,
        *,
        name: Literal["cifar10", "cifar100"],
        batch_size: int = 128,
        root: str | None = None,
        augment: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if name not in SOURCES:
            raise ValueError(f"name={name!r}: write {' or '.join(map(repr, SOURCES))}")
        self.source = SOURCES[name]
        self._files = None if root is None else hub.find_parquet(self.source.repository, root, ("train", "test"))
        crop_and_flip = AugmentationSequential(
            RandomCrop((SIZE, SIZE), padding=4), RandomHorizontalFlip(), data_keys=["input"]
        )
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            augmentation=crop_and_flip if augment else None,
            mean=self.source.mean,
            std=self.source.std,
        )

    def prepare_data(self) -> None:
        """Download and decode, once per host; :meth:`load` then finds it in the cache."""
        for train in (True, False):
            self._decoded(train)

    def load(self, train: bool) -> TensorDataset:
        rows = self._decoded(train)
        pixels = rows.with_format("numpy", dtype=np.uint8)["pixels"][:]
        return TensorDataset(torch.from_numpy(pixels).view(-1, 3, SIZE, SIZE), torch.tensor(rows["label"][:]))

    def _decoded(self, train: bool) -> datasets.Dataset:
        columns = ("img", self.source.label)
        rows = hub.load(self.source.repository, self._files, "train" if train else "test", columns)
        pixels = datasets.Sequence(datasets.Value("uint8"), length=3 * SIZE * SIZE)
        return rows.map(
            decode,
            batched=True,
            fn_kwargs={"label": self.source.label},
            remove_columns=rows.column_names,
            features=datasets.Features({"pixels": pixels, "label": datasets.Value("int64")}),
            desc="Decoding",
        )


def decode(rows: dict[str, list[Any]], label: str) -> dict[str, list[Any]]:
    """Return the pixels of images in one row each, channel by channel, and their labels."""
    pixels = [np.asarray(image.convert("RGB")).transpose(2, 0, 1).reshape(-1) for image in rows["img"]]
    return {"pixels": pixels, "label": rows[label]}
