"""Runs a pipeline of given stage times: DSP by its own schedule and staleness, GPipe and 1F1B by theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_stale.pipeline.schedule import Operation, drain, iteration
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.simulation.pipeline.engine import MessageTime, Work, run_stages
from lightning_stale.simulation.pipeline.outcome import PipelineOutcome
from lightning_stale.simulation.pipeline.setting import DSPSetting, FlushingSetting, PipelineSetting
from lightning_stale.simulation.pipeline.stage_times import StageTimes


@dataclass(frozen=True)
class Costs:
    """What a pipeline costs beside the stages' own times, in seconds. By default, nothing.

    Args:
        message_s: each message between two stages, however small.
        features_s: besides, the features of a whole batch, or their gradients; a microbatch pays its part.
        operation_s: the part of each forward and each backward that does not shrink with the batch (launching kernels,
            Python): what microbatches pay again and again.

    Raises:
        ValueError: for a negative value.
    """

    message_s: float = 0.0
    features_s: float = 0.0
    operation_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"Costs({name}={value}): write a number of at least 0")


NOTHING = Costs()
"""Messages are free, and microbatches too."""


def run_pipeline(
    setting: PipelineSetting, times: StageTimes, costs: Costs = NOTHING, *, batches: int | None = None
) -> PipelineOutcome:
    """Simulate an epoch of a pipeline with one stage per rank, from the first forward to the last step.

    Args:
        setting: what is run.
        times: of the stages.
        costs: of messages, and of microbatches.
        batches: of the epoch; those of ``times`` by default.

    Raises:
        ValueError: if ``batches`` is not above zero, or the setting is none for so many stages.

    Example::

        >>> from lightning_stale.simulation import draw_stages, parse_pipeline, run_pipeline
        >>> times = draw_stages(4, 0.02, 0.04)
        >>> for name in ("bp", "dsp", "dsp@no-recompute", "1f1b:8"):
        ...     outcome = run_pipeline(parse_pipeline(name), times, batches=1000)
        ...     print(name, round(outcome.efficiency, 2))
        bp 0.25
        dsp 0.75
        dsp@no-recompute 1.0
        1f1b:8 0.73
    """
    batches = times.batches if batches is None else batches
    if batches < 1:
        raise ValueError(f"batches={batches}: write at least one")
    stages = times.stages
    if isinstance(setting, DSPSetting):
        staleness = setting.of(stages)
        runs = run_stages(
            [stage_works(staleness, k, setting.recompute, times, batches) for k in range(stages)],
            staleness.p,
            staleness.q,
            constant(costs.message_s + costs.features_s),
        )
        m = staleness.m
    else:
        parts = setting.microbatches
        runs = run_stages(
            [_flushing_works(setting, k, times, batches, costs.operation_s) for k in range(stages)],
            (math.inf,) * stages,
            (math.inf,) * stages,
            constant(costs.message_s + costs.features_s / parts),
        )
        m = (0,) * stages
    return PipelineOutcome(setting.name, m, batches, times.own_rate, tuple(runs))


def constant(seconds: float) -> MessageTime:
    """Return what lets every message take ``seconds``."""
    return lambda direction, sender, number: seconds


def stage_works(staleness: Staleness, stage: int, recompute: bool, times: StageTimes, batches: int) -> Iterator[Work]:
    """Yield what a stage of DSP does in an epoch: its iterations, and then the backwards that are left."""
    m = staleness.m[stage]
    forward, backward = times.forward[stage], times.backward[stage]
    update = times.update[stage] if times.update else (0.0,)

    def work(operation: Operation) -> Work:
        again = forward[operation.batch % len(forward)]
        if operation.kind == "forward":
            return Work("forward", again)
        once = backward[operation.batch % len(backward)]
        return Work("backward", once + again if recompute and m > 0 else once)

    for n in range(batches):
        yield from map(work, iteration(n, m))
        yield Work("update", update[n % len(update)])
    for operation in drain(batches, m):
        yield work(operation)
        yield Work("update", update[operation.batch % len(update)])


def _flushing_works(
    setting: FlushingSetting, stage: int, times: StageTimes, batches: int, operation_s: float
) -> Iterator[Work]:
    forward, backward = times.forward[stage], times.backward[stage]
    update = times.update[stage] if times.update else (0.0,)
    operations = list(setting.operations(stage, times.stages))

    def part(seconds: float) -> float:
        fixed = min(operation_s, seconds)
        return fixed + (seconds - fixed) / setting.microbatches

    for n in range(batches):
        each = {"forward": part(forward[n % len(forward)]), "backward": part(backward[n % len(backward)])}
        for operation in operations:
            yield Work(operation.kind, each[operation.kind])
        yield Work("update", update[n % len(update)])
