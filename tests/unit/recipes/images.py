"""Small data sets in the layouts of the real ones, and what became of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from tests.integration.harness import ROOT

REAL = ROOT.parent / "shared" / "data"
"""Where the real CIFAR lies, on machines that have it."""


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Return (count, 32, 32, 3) random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_cifar(root: Path, label: str = "label", train: int = 32, test: int = 8) -> Path:
    """Write PNG images of noise as ``hf download uoft-cs/cifar10 --local-dir root`` leaves them; labels count up."""
    (root / "plain_text").mkdir(parents=True)
    trace = root / ".cache" / "huggingface" / "download" / "plain_text"  # what the download command notes for itself
    trace.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        rows = {
            "img": [Image.fromarray(pixels) for pixels in noise(count, seed=len(split))],
            label: [i % 10 for i in range(count)],
        }
        features = datasets.Features({"img": datasets.Image(), label: datasets.Value("int64")})
        name = f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(root / "plain_text" / name)
        (trace / f"{name}.metadata").write_text("")
    return root


def subset(folder: Path, name: str, **counts: int) -> Path:
    """Write the first rows of the real files, ``counts`` by split."""
    folder.mkdir()
    for split, count in counts.items():
        file = f"{split}-00000-of-00001.parquet"
        rows = datasets.load_dataset("parquet", data_files=str(REAL / name / file), split=f"train[:{count}]")
        rows.to_parquet(folder / file)
    return folder


def write_class_folders(root: Path, per_class: int = 4) -> Path:
    """Write JPEG images, of unequal sizes and kinds, as ImageNet's come out of its archives."""
    generator = np.random.default_rng(0)
    kinds = ["RGB", "L", "CMYK", "RGB"]
    for split in ("train", "val"):
        for number, wordnet in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / split / wordnet
            folder.mkdir(parents=True)
            for i in range(per_class):
                height, width = generator.integers(40, 90, 2)
                pixels = np.full((height, width, 3), 40 + 80 * number, np.uint8)  # one gray per class
                Image.fromarray(pixels).convert(kinds[i % 4]).save(folder / f"{split}_{i}.JPEG")
    return root


def whereabouts(image: Tensor, originals: Tensor) -> tuple[int, int, int, bool]:
    """Return which original ``image`` is, how far it was moved down and right, and whether it was flipped.

    Raises:
        AssertionError: if it is no shifted or flipped original, or several.
    """
    padded = torch.nn.functional.pad(originals, (4, 4, 4, 4))
    found = []
    for flipped in (False, True):
        upright = image.flip(-1) if flipped else image
        patch = upright[:, 12:16, 12:16]  # to find candidates fast
        places = padded[:, :, 12:24, 12:24].unfold(2, 4, 1).unfold(3, 4, 1)  # (originals, channels, 9, 9, 4, 4)
        near = (places - patch[:, None, None]).abs().amax((1, 4, 5)) < 1e-3
        for i, down, right in near.nonzero().tolist():
            crop = padded[i, :, down : down + 32, right : right + 32]
            if (crop - upright).abs().max() < 1e-3:
                found.append((i, down, right, flipped))
    assert len(found) == 1, found
    return found[0]


class Record(Callback):
    """Keeps the batches that training and validation saw."""

    def __init__(self) -> None:
        self.train: list[list[Tensor]] = []
        self.validation: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.train.append([tensor.clone() for tensor in batch])

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: list[Tensor], *_: Any) -> None:
        self.validation.append([tensor.clone() for tensor in batch])
