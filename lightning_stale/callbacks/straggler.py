"""Emulate unequal workers, for experiments."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

_BACKWARD_OVER_FORWARD = 2.0  # the usual estimate of the cost of a backward pass


class StragglerInjection(Callback):
    """Slow workers down: some always, and all now and then. Never on by default; for experiments and benchmarks.

    Before each backward pass, i.e. before any gradient is exchanged, the worker sleeps for the time by which its step
    is to be longer. So it slows ``ddp`` and the strategies of this package alike.

    Args:
        factors: rank -> how many times longer its steps take, e.g. ``{0: 2.3}``.
        probability: with which a step of any rank is slow besides.
        slowdown: how many times longer such a step takes.
        step_s: the time of a step in seconds; measured if ``None``: three times the forward pass, since a backward
            pass costs about two.
        seed: of the random choice; each rank draws its own sequence from it.

    Raises:
        ValueError: for a factor or ``slowdown`` below 1, a probability outside 0..1, or a negative time.

    Example::

        >>> from lightning_stale import StragglerInjection
        >>> StragglerInjection(factors={0: 2.3}, probability=0.1, slowdown=3.0, seed=1).delay_factor(rank=0) > 1.2
        True
    """

    def __init__(
        self,
        *,
        factors: Mapping[int, float] | None = None,
        probability: float = 0.0,
        slowdown: float = 2.0,
        step_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self.factors = dict(factors or {})
        for rank, factor in self.factors.items():
            if factor < 1:
                raise ValueError(f"factors={{{rank}: {factor}}}: write how many times longer its steps take, >= 1")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability}: write a number from 0 to 1, e.g. 0.1")
        if slowdown < 1:
            raise ValueError(f"slowdown={slowdown}: it says how many times longer a slow step takes, >= 1")
        if step_s is not None and step_s < 0:
            raise ValueError(f"step_s={step_s}: write seconds >= 0, e.g. 0.02")
        self.probability = probability
        self.slowdown = slowdown
        self.step_s = step_s
        self.seed = seed
        self._rank = 0
        self._random: dict[int, random.Random] = {}
        self._started = 0.0

    def delay_factor(self, rank: int) -> float:
        """Return by how many step times the next step of ``rank`` is longer; draws from its random sequence."""
        generator = self._random.setdefault(rank, random.Random(f"{self.seed}/{rank}"))
        factor = self.factors.get(rank, 1.0)
        if generator.random() < self.probability:
            factor *= self.slowdown
        return factor - 1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse factors of ranks that are not there."""
        absent = sorted(rank for rank in self.factors if not 0 <= rank < trainer.world_size)
        if absent:
            raise MisconfigurationException(
                f"factors={self.factors}: there is no rank {absent[0]} among {trainer.world_size}; write ranks "
                f"from 0 to {trainer.world_size - 1}, or Trainer(devices={absent[0] + 1})"
            )
        self._rank = trainer.global_rank  # that of a Trainer is another one once a worker is lost

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note when the step began."""
        self._started = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sleep."""
        forward_s = time.perf_counter() - self._started
        step_s = (1 + _BACKWARD_OVER_FORWARD) * forward_s if self.step_s is None else self.step_s
        time.sleep(self.delay_factor(self._rank) * step_s)
        self._started = time.perf_counter()  # a further backward of the same batch counts from here
