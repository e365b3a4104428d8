"""How long each stage takes for the forward and the backward of each batch, and how to draw such times."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Times = tuple[tuple[float, ...], ...]
"""For each stage, seconds for each batch in order; after its last, its first comes again."""


@dataclass(frozen=True)
class StageTimes:
    """What each stage takes for each batch, in seconds; after its last time, its first comes again.

    Args:
        name: what they are of, for titles.
        forward: for each stage, the forward of each batch.
        backward: for each stage, the backward of each batch, without a second forward before it.
        update: for each stage, what comes after each backward: the optimizer's step, and all else that the training
            loop does. Empty: nothing.

    Raises:
        ValueError: if there is no stage, their numbers differ, or a time cannot be.

    Example::

        >>> from lightning_stale.simulation import StageTimes
        >>> times = StageTimes("two stages", forward=((1.0,), (2.0,)), backward=((2.0,), (3.0, 5.0)))
        >>> times.stages, times.own(1), round(times.own_rate, 3)
        (2, 6.0, 0.167)
    """

    name: str
    forward: Times
    backward: Times
    update: Times = ()

    def __post_init__(self) -> None:
        if not self.forward:
            raise ValueError(f"{self.name}: there is no stage; write the times of at least one")
        for what, times in (("forward", self.forward), ("backward", self.backward), ("update", self.update)):
            if what == "update" and not times:
                continue
            if len(times) != self.stages:
                raise ValueError(
                    f"{self.name}: {what} has {len(times)} stages and forward has {self.stages}: write one each"
                )
            for stage, each in enumerate(times):
                least = 0.0 if what == "update" else math.ulp(0.0)
                wrong = next((time for time in each if not least <= time < math.inf), None)
                if not each or wrong is not None:
                    shown = "no" if wrong is None else f"a {what} of {wrong} s, and no"
                    raise ValueError(f"{self.name}: stage {stage} has {shown} time that can be: write seconds above 0")

    @property
    def stages(self) -> int:
        """How many there are, ``K``."""
        return len(self.forward)

    @property
    def batches(self) -> int:
        """As many batches have a time of their own on every stage."""
        return min(len(each) for each in (*self.forward, *self.backward))

    def own(self, stage: int) -> float:
        """Return what ``stage`` takes for a batch alone, on average: one forward, one backward, and the update."""
        return sum(statistics.fmean(times[stage]) for times in (self.forward, self.backward, self.update) if times)

    @property
    def own_rate(self) -> float:
        """Batches per second of the slowest stage, if it were alone: the limit of what any setting can reach."""
        return 1 / max(self.own(stage) for stage in range(self.stages))


def draw_stages(
    stages: int,
    forward_s: float | Sequence[float],
    backward_s: float | Sequence[float],
    *,
    update_s: float = 0.0,
    jitter: float = 0.0,
    stragglers: float = 0.0,
    straggler_factor: float = 2.0,
    batches: int = 200,
    seed: int = 0,
) -> StageTimes:
    """Draw the times of the stages.

    Args:
        stages: how many.
        forward_s: the median time of a forward, in seconds: of all stages, or of each.
        backward_s: likewise of a backward, without a second forward.
        update_s: of what comes after it, on each stage.
        jitter: the spread of each time: log-normal, with this standard deviation of the logarithm (0.1 is about 10 %).
        stragglers: the probability with which a forward or backward takes ``straggler_factor`` times as long.
        straggler_factor: see there.
        batches: how many to draw for each stage.
        seed: the same seed, the same times.

    Raises:
        ValueError: for what cannot be.

    Example::

        >>> from lightning_stale.simulation import draw_stages
        >>> times = draw_stages(2, 0.5, [1.0, 2.0], batches=1)
        >>> times.forward, times.backward
        (((0.5,), (0.5,)), ((1.0,), (2.0,)))
    """
    if stages < 1 or batches < 1:
        raise ValueError(f"stages={stages}, batches={batches}: write at least one of each")
    if not 0 <= stragglers <= 1:
        raise ValueError(f"stragglers={stragglers}: write a probability between 0 and 1")
    if jitter < 0:
        raise ValueError(f"jitter={jitter}: write a spread of at least 0, e.g. 0.1")
    generator = random.Random(seed)

    def time(median: float) -> float:
        value = median * (math.exp(generator.gauss(0.0, jitter)) if jitter else 1.0)
        return value * (straggler_factor if stragglers and generator.random() < stragglers else 1.0)

    def times(what: str, seconds: float | Sequence[float]) -> Times:
        medians = [seconds] * stages if isinstance(seconds, (int, float)) else list(seconds)
        if len(medians) == 1:
            medians *= stages
        if len(medians) != stages:
            raise ValueError(f"{what} has {len(medians)} values for {stages} stages: write one, or one per stage")
        return tuple(tuple(time(median) for _ in range(batches)) for median in medians)

    return StageTimes(
        f"{_shown(forward_s)}/{_shown(backward_s)} ms forward/backward",
        times("forward_s", forward_s),
        times("backward_s", backward_s),
        ((update_s,),) * stages if update_s else (),
    )


def _shown(seconds: float | Sequence[float]) -> str:
    values = [seconds] if isinstance(seconds, (int, float)) else seconds
    least, most = (f"{1e3 * value:g}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"
