"""The baseline: all workers meet in an all-reduce at every step."""

from __future__ import annotations

from collections import Counter

from lightning_stale.simulation.cluster import FREE, Cluster
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.step_times import StepTimes


def run_ddp(
    times: StepTimes, cluster: Cluster = FREE, *, steps: int | None = None, epochs: int = 1, seed: int = 0
) -> Outcome:
    """Return what DDP makes of the same step times: each step takes as long as its slowest, and the all-reduce.

    Of overlap between backward pass and all-reduce it knows nothing: ``all_reduce_s`` of the cluster is what is left
    of it. A death ends the run, which begins again from the last checkpoint.

    Args:
        times: of the workers.
        cluster: what an exchange costs.
        steps: of each worker in an epoch; those of ``times`` by default.
        epochs: how many.
        seed: of the deaths.

    Example::

        >>> from lightning_stale.simulation import StepTimes, run_ddp
        >>> outcome = run_ddp(StepTimes("one slow", ((1.0,), (3.0,))), steps=10)
        >>> outcome.epoch_s, outcome.waiting, outcome.efficiency
        (30.0, 0.33333333333333337, 0.5)
    """
    steps = times.steps if steps is None else steps
    ring_s = cluster.ring_s(times.workers)
    seconds = computed = 0.0
    for number in range(steps * epochs):
        each = [mine[number % len(mine)] for mine in times.of]
        seconds += max(each) + ring_s
        computed += sum(each)
    took = cluster.with_restarts(seconds, times.workers, seed)
    batches = steps * epochs * times.workers
    return Outcome(
        "ddp",
        "shards",
        times.workers,
        epochs,
        batches,
        took,
        computing=computed / (seconds * times.workers),
        efficiency=batches / took / times.own_rates,
        staleness=Counter({0: batches}),
    )
