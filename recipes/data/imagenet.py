"""ImageNet from the Hugging Face hub, a folder of parquet files, or a folder with one folder of images per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from kornia.augmentation import RandomHorizontalFlip, RandomResizedCrop
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from recipes.data import hub
from recipes.data.base import ImageDataModule, random_numbers

REPOSITORY = "ILSVRC/imagenet-1k"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTRE = 224 / 256
"""The part of an image's shorter side that is measured with: 224 pixels of 256."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


class ImageNet(ImageDataModule):
    """1,281,167 training and 50,000 validation images in 1000 classes, or any images in the same layout.

    A training image is a random part (8 % to 100 %, at 3:4 to 4:3) of the original, flipped at random; what is measured
    with is the middle of it (224 of 256 pixels). Images differ in size, so that each is cut out and resized by the
    process that reads it (choose ``num_workers`` by the CPU cores per worker); flips and scaling are done on whole
    batches. The labels of the test split are not public: validation and test are both the validation split.

    Hugging Face ``datasets`` writes what it reads from parquet files once more into its cache, about 150 GB: set
    ``HF_HOME`` to a disk that has them. From folders of images it notes the paths only.

    Args:
        batch_size: images per batch and worker.
        root: a folder with ``train-*.parquet`` and ``validation-*.parquet`` (at any depth), or with
            ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``; ``None`` reads from the hub, which wants a login.
        size: height and width in pixels of what the model is given.
        num_workers: processes that read images, per worker.
        seed: of order and augmentation.

    Raises:
        FileNotFoundError: if there are no such files under ``root``, with the command that downloads them.

    Example::

        >>> from recipes.data import ImageNet
        >>> ImageNet(batch_size=32, num_workers=8).batch_size
        32
    """

    def __init__(
        self, *, batch_size: int = 32, root: str | None = None, size: int = 224, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            augmentation=RandomHorizontalFlip(),
            mean=MEAN,
            std=STD,
        )
        self.size = size
        self._folder = None if root is None else find_class_folders(root)
        self._files = None
        if root is not None and self._folder is None:
            self._files = hub.find_parquet(REPOSITORY, root, ("train", "validation"))

    def prepare_data(self) -> None:
        """Download, or list the images of a folder, once per host; :meth:`load` then finds it in the cache."""
        for train in (True, False):
            self._rows(train)

    def load(self, train: bool) -> Dataset[Any]:
        return Crops(self._rows(train), self.size, (self.seed, self._place["rank"]) if train else None)

    def _rows(self, train: bool) -> datasets.Dataset:
        split = "train" if train else "validation"
        if self._folder is None:
            return hub.load(REPOSITORY, self._files, split, ("image", "label"))
        files = {name: f"{path}/**" for name, path in self._folder.items()}
        return datasets.load_dataset("imagefolder", data_files=files, split=split, drop_labels=False)


def find_class_folders(root: str) -> dict[str, Path] | None:
    """Return the folders of training and validation images under ``root``, or ``None`` if it is not of that kind.

    Raises:
        FileNotFoundError: if ``root`` is no folder, or half of it is missing, with what it should be.
        ValueError: if the two have other classes.
    """
    folder = hub.check_folder(REPOSITORY, root)
    train = folder / "train"
    validation = next((path for name in hub.SPLITS["validation"] if (path := folder / name).is_dir()), folder / "val")
    classes = [sorted(child.name for child in path.glob("*/")) for path in (train, validation)]
    if not any(classes):
        return None
    for path, names in zip((train, validation), classes, strict=True):
        if not names:
            raise FileNotFoundError(
                f"root={root!r} has no folders in {path}: put the images in train/<class>/ and val/<class>/, or "
                f"download parquet files with `{hub.download_command(REPOSITORY, root)}`"
            )
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise ValueError(
            f"root={root!r}: {train} and {validation} have other classes: {', '.join(odd[:5])} is in one only"
        )
    return {"train": train, "validation": validation}


class Crops(Dataset[Any]):
    """A part of each image, as uint8 (3, size, size), and its label.

    Args:
        rows: with the columns ``image`` and ``label``.
        size: height and width of the result in pixels.
        key: seeds random parts, different in each process that reads; ``None`` takes the middle.
    """

    def __init__(self, rows: datasets.Dataset, size: int, key: tuple[int, ...] | None) -> None:
        self.rows, self.size, self.key = rows, size, key
        self._random_part = RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        self._drawn = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = row["image"].convert("RGB")
        box = middle(*image.size) if self.key is None else self._draw(*image.size)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), row["label"]

    def _draw(self, width: int, height: int) -> Box:
        assert self.key is not None
        info = get_worker_info()
        with random_numbers(*self.key, info.seed if info else 0, self._drawn):
            corners = self._random_part.forward_parameters((1, 3, height, width))["src"][0]
        self._drawn += 1
        (left, top), (right, bottom) = corners[0].tolist(), corners[2].tolist()
        return left, top, right + 1, bottom + 1


def middle(width: int, height: int) -> Box:
    """Return the square in the middle of an image that is measured with.

    Example::

        >>> from recipes.data.imagenet import middle
        >>> middle(512, 256)
        (144.0, 16.0, 368.0, 240.0)
    """
    side = CENTRE * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
