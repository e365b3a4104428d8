"""An image classifier like any other: nothing in it knows of staleness."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(L.LightningModule):
    """Cross entropy and accuracy over the outputs of ``model``.

    Logs ``train_loss``, and at the end of an epoch ``val_loss`` and ``val_accuracy`` (the share of images that are
    right, over all workers), or ``test_loss`` and ``test_accuracy``.

    Args:
        model: gives (batch, num_classes) for (batch, channels, height, width); what a pipeline cuts.
        optimizer: makes the optimizer of the parameters, e.g. ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: makes the learning-rate scheduler of the optimizer; it steps once per epoch.
        num_classes: the number of classes.

    Example::

        >>> from functools import partial
        >>> import torch
        >>> from recipes.classifier import ImageClassifier
        >>> from recipes.models import digits_cnn
        >>> module = ImageClassifier(
        ...     model=digits_cnn(), optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=None, num_classes=10
        ... )
        >>> module(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.model = model
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.val_accuracy = MulticlassAccuracy(num_classes=num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: list[Tensor], name: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        outputs = self(images)
        accuracy(outputs, labels)
        self.log(f"{name}_loss", nn.functional.cross_entropy(outputs, labels), sync_dist=True)
        self.log(f"{name}_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        return [optimizer], [self._make_scheduler(optimizer)]
