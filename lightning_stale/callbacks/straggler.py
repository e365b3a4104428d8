"""Emulate unequal workers, for experiments."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_stale.callbacks.step_trace import StepTrace

_BACKWARD_OVER_FORWARD = 2.0  # the usual estimate of the cost of a backward pass
_LATE = 0.1  # the share of steps that may be slower than the trace without a word: caches are cold, a machine hiccups


class StragglerInjection(Callback):
    """Slow workers down: some always, all now and then, or as in a real job. For experiments and benchmarks.

    Before each backward pass, i.e. before any gradient is exchanged, the worker sleeps for the time by which its step
    is to be longer. So it slows ``ddp`` and the strategies of this package alike.

    With a ``trace`` a batch takes as long as a step of a real job did: the n-th batch that a rank computes takes the
    n-th time of its worker in the trace, in every run the same; after the last comes the first again. It sleeps for
    what is left of that time, so a step that is longer by itself stays longer; where many are, a warning at the end of
    ``fit`` says so. ``factors``, ``probability`` and ``slowdown`` act on the times of the trace.

    Args:
        trace: the steps of a real job, or the path of a file with one; see :class:`StepTrace`.
        factors: rank -> how many times longer its steps take, e.g. ``{0: 2.3}``.
        probability: with which a step of any rank is slow besides.
        slowdown: how many times longer such a step takes.
        step_s: the time of a step in seconds; measured if ``None``: three times the forward pass, since a backward
            pass costs about two.
        seed: of the random choice; each rank draws its own sequence from it.

    Raises:
        ValueError: for a factor or ``slowdown`` below 1, a probability outside 0..1, or a negative time; and what
            :class:`StepTrace` raises, for a path.

    Example::

        >>> from lightning_stale import StragglerInjection
        >>> StragglerInjection(factors={0: 2.3}, probability=0.1, slowdown=3.0, seed=1).delay_factor(rank=0) > 1.2
        True

    The steps of a real job, of which one takes 20 s, in 20 ms each::

        >>> from lightning_stale import StepTrace, StragglerInjection
        >>> trace = StepTrace("recipes/traces/straggler_steps.csv.gz", job="AR", scale=0.001)
        >>> slow = StragglerInjection(trace=trace)
        >>> [round(slow.delay_s(rank, step_s=0.010), 3) for rank in range(4)]  # a step takes 10 ms by itself
        [0.035, 0.01, 0.009, 0.009]
    """

    def __init__(
        self,
        *,
        trace: StepTrace | str | PathLike[str] | None = None,
        factors: Mapping[int, float] | None = None,
        probability: float = 0.0,
        slowdown: float = 2.0,
        step_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self.trace = trace if trace is None or isinstance(trace, StepTrace) else StepTrace(trace)
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
        self._rank: int | None = None  # when it was set up: that of a Trainer is another one once a worker is lost
        self._random: dict[int, random.Random] = {}
        self._started = 0.0
        self._replayed: Counter[int] = Counter()  # steps of the trace, by rank
        self._late: Counter[int] = Counter()  # those that took longer by themselves
        self._slept = False  # in this batch

    def delay_factor(self, rank: int) -> float:
        """Return by how many step times the next step of ``rank`` is longer; draws from its random sequence."""
        generator = self._random.setdefault(rank, random.Random(f"{self.seed}/{rank}"))
        factor = self.factors.get(rank, 1.0)
        if generator.random() < self.probability:
            factor *= self.slowdown
        return factor - 1.0

    def delay_s(self, rank: int, step_s: float) -> float:
        """Return how many seconds the next step of ``rank`` sleeps, which takes ``step_s`` by itself; like a draw."""
        if self.trace is None:
            return self.delay_factor(rank) * step_s
        seconds = self.trace.seconds(rank, self._replayed[rank]) * (1 + self.delay_factor(rank))
        self._replayed[rank] += 1
        self._late[rank] += seconds < step_s
        return max(0.0, seconds - step_s)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse factors of ranks that are not there, and ranks that are not in the trace."""
        self._rank = trainer.global_rank
        if self._rank >= trainer.world_size:
            return  # it joins a fit that runs, and knows nobody yet
        absent = sorted(rank for rank in self.factors if not 0 <= rank < trainer.world_size)
        if absent:
            raise MisconfigurationException(
                f"factors={self.factors}: there is no rank {absent[0]} among {trainer.world_size}; write ranks "
                f"from 0 to {trainer.world_size - 1}, or Trainer(devices={absent[0] + 1})"
            )
        if self.trace is not None:
            _check_ranks(self.trace, trainer.world_size)
            if stage == "fit":
                rank_zero_info(
                    f"StragglerInjection replays {len(self.trace)} steps of job {self.trace.job}; after the last comes "
                    "the first again"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note when the step began."""
        self._started = time.perf_counter()
        self._slept = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sleep."""
        if self.trace is not None and self._slept:
            return  # a batch takes one time of the trace, however many backward passes it has
        forward_s = time.perf_counter() - self._started
        step_s = (1 + _BACKWARD_OVER_FORWARD) * forward_s if self.step_s is None else self.step_s
        time.sleep(self.delay_s(self._rank_of(trainer), step_s))
        self._slept = True
        self._started = time.perf_counter()  # a further backward of the same batch counts from here

    def _rank_of(self, trainer: Trainer) -> int:
        return trainer.global_rank if self._rank is None else self._rank

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where many steps were slower by themselves than in the trace."""
        rank = self._rank_of(trainer)
        if self._late[rank] > _LATE * self._replayed[rank]:
            warnings.warn(
                f"StragglerInjection: {self._late[rank]} of {self._replayed[rank]} steps of rank {rank} took longer by "
                "themselves than the trace says, so that its times were not replayed: write a larger "
                "StepTrace(scale=...)",
                stacklevel=1,
            )


def _check_ranks(trace: StepTrace, ranks: int) -> None:
    workers = len(trace.workers)
    if workers < ranks:
        again = [trace.workers[rank % workers] for rank in range(ranks)]
        raise MisconfigurationException(
            f"{trace!r} has {workers} workers for {ranks} ranks: write StepTrace(workers={again}), in which a worker "
            f"stands for several, or Trainer(devices={workers})"
        )
    if trace.chosen and workers > ranks:
        raise MisconfigurationException(
            f"workers={list(trace.workers)}: they are {workers}, and there are {ranks} ranks; write one for each rank"
        )
