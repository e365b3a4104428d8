"""How long the steps of each worker take, and how to draw such times."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """The step times of each worker, in seconds; after its last, its first comes again.

    Args:
        name: what they are of, for titles.
        of: for each worker, its steps in order. One that was faster may have more.

    Raises:
        ValueError: if there is no worker, one has no steps, or a time is not above zero.

    Example::

        >>> from lightning_stale.simulation import StepTimes
        >>> times = StepTimes("two workers", ((1.0, 1.0), (2.0, 3.0)))
        >>> times.workers, times.steps, times.own_rates
        (2, 2, 1.4)
    """

    name: str
    of: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError(f"{self.name}: there are no step times; write at least one per worker")
        for worker, each in enumerate(self.of):
            if not each:
                raise ValueError(f"{self.name}: there are no step times of worker {worker}; write at least one")
            wrong = next((time for time in each if not 0 < time < math.inf), None)
            if wrong is not None:
                raise ValueError(f"{self.name}: worker {worker} has a step of {wrong} s: write seconds above zero")

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self.of)

    @property
    def steps(self) -> int:
        """How many each has, at least."""
        return min(map(len, self.of))

    @property
    def own_rates(self) -> float:
        """Steps per second of all workers, if each were alone: the limit of what any setting can reach."""
        return sum(1 / statistics.fmean(each) for each in self.of)

    @property
    def slowest(self) -> float:
        """How many times slower than their median the slowest worker is."""
        means = [statistics.fmean(each) for each in self.of]
        return max(means) / statistics.median(means)


def draw(
    workers: int,
    step_s: float,
    *,
    factors: Sequence[float] = (),
    jitter: float = 0.0,
    stragglers: float = 0.0,
    straggler_factor: float = 5.0,
    steps: int = 200,
    seed: int = 0,
) -> StepTimes:
    """Draw step times.

    Args:
        workers: how many.
        step_s: the median time of a step, in seconds.
        factors: how many times slower the first workers are for good; the others are not.
        jitter: the spread of each step: log-normal, with this standard deviation of the logarithm (0.1 is about 10 %).
        stragglers: the probability of a step that takes ``straggler_factor`` times as long.
        straggler_factor: see there.
        steps: how many to draw for each worker.
        seed: the same seed, the same times.

    Raises:
        ValueError: for what cannot be.

    Example::

        >>> from lightning_stale.simulation import draw
        >>> draw(3, 0.5, factors=[2.0], steps=2).of
        ((1.0, 1.0), (0.5, 0.5), (0.5, 0.5))
    """
    if workers < 1 or steps < 1:
        raise ValueError(f"workers={workers}, steps={steps}: write at least one of each")
    if len(factors) > workers:
        raise ValueError(f"{len(factors)} factors for {workers} workers: write one per slow worker")
    if not 0 <= stragglers <= 1:
        raise ValueError(f"stragglers={stragglers}: write a probability between 0 and 1")
    if jitter < 0:
        raise ValueError(f"jitter={jitter}: write a spread of at least 0, e.g. 0.1")
    generator = random.Random(seed)

    def time(factor: float) -> float:
        value = step_s * factor * (math.exp(generator.gauss(0.0, jitter)) if jitter else 1.0)
        return value * (straggler_factor if stragglers and generator.random() < stragglers else 1.0)

    each = [*factors, *[1.0] * (workers - len(factors))]
    times = tuple(tuple(time(factor) for _ in range(steps)) for factor in each)
    return StepTimes(f"{1e3 * step_s:g} ms a step", times)
