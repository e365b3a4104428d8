"""What all image data sets here share: loaders, augmentation of whole batches, and scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def mix(*key: int) -> int:
    """Return a seed that depends on each of the numbers ``key`` (all >= 0), and is unlike that of any other key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def random_numbers(*key: int) -> Iterator[None]:
    """Have torch draw numbers (on the CPU) that depend on ``key`` alone; afterwards it goes on as if nothing was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(*key))
        yield


class ImageDataModule(L.LightningDataModule):
    """Loaders of ``[images, labels]``: (batch, channels, height, width) and (batch,).

    A subclass says where the images come from (:meth:`load`); uint8 images are scaled to 0..1, augmented if they are
    for training, and normalized, all as whole batches on the device of the model.

    The draws of this augmentation depend on the seed, the worker and the batch alone. Two workers draw differently, a
    run that is resumed goes on with the draws it would have had, and the stages of a pipeline, which are one worker,
    draw alike. Crops and flips leave the labels as they are, so that a stage may have the labels from its own loader.

    Args:
        batch_size: images per batch and worker.
        num_workers: processes that read images, per worker; 0 reads in the training process itself.
        seed: of order and augmentation.
        augmentation: of float images in 0..1, e.g. kornia's, which draws for each image of the batch.
        mean: of each channel of the training images, in 0..1; with ``std``, for normalization.
        std: the standard deviation of each channel.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        augmentation: nn.Module | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: write the number of images per batch and worker, e.g. 128")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augmentation = augmentation
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self._sets: dict[bool, Dataset[Any]] = {}

    def load(self, train: bool) -> Dataset[Any]:
        """Return the images and labels to train on, or those to measure with."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        for train in (True, False) if stage == "fit" else (False,):
            if train not in self._sets:
                self._sets[train] = self.load(train)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches, all of one size.

        An incomplete last batch is left out: a parameter server would give its few images the weight of a whole batch,
        and batch normalization cannot do with one image.

        Raises:
            ValueError: if there is not one whole batch per worker.
        """
        images, workers = len(self._sets[True]), self._place["num_replicas"]
        if images // workers < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: {images} images are {images // workers} for each of {workers} workers, "
                f"and incomplete batches are left out: write batch_size={max(1, images // workers)} or less"
            )
        return self._loader(train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(train=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(train=False)

    def _loader(self, train: bool) -> DataLoader[Any]:
        epoch = 0 if self.trainer is None else self.trainer.current_epoch  # not the first one's order again on resuming
        return DataLoader(
            self._sets[train],
            batch_size=self.batch_size,
            shuffle=train,
            drop_last=train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(mix(self.seed, self._place["rank"], epoch)),
        )

    @property
    def _place(self) -> dict[str, int]:
        """Return ``num_replicas`` and ``rank`` among those that see different images."""
        alone = {"num_replicas": 1, "rank": 0}
        return alone if self.trainer is None else self.trainer.distributed_sampler_kwargs or alone

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Scale, augment in training, and normalize."""
        images, labels = batch
        trainer = self.trainer
        assert trainer is not None
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self.augmentation is not None and trainer.training:
            with random_numbers(self.seed, self._place["rank"], trainer.fit_loop.total_batch_idx + 1):
                images = self.augmentation(images)
        if self.mean.numel():
            images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        return [images.to(trainer.lightning_module.dtype), labels]
