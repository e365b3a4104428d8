"""Which setting of a pipeline is worth its staleness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_stale.simulation.choice import ALIKE, WORTH
from lightning_stale.simulation.pipeline.outcome import PipelineOutcome


@dataclass(frozen=True)
class PipelineChoice:
    """The setting that is chosen, and why.

    Args:
        outcome: of it.
        baseline: the fastest of those without staleness; ``None`` if nothing of the kind was compared.
        sentence: for people.
    """

    outcome: PipelineOutcome
    baseline: PipelineOutcome | None
    sentence: str

    @property
    def gain(self) -> float:
        """Its batches per second, over those of the baseline."""
        return 1.0 if self.baseline is None else self.outcome.rate / self.baseline.rate


def choose_pipeline(outcomes: Sequence[PipelineOutcome], max_staleness: int) -> PipelineChoice:
    """Return the fastest within a bound on staleness; of those that are about as fast, the least stale.

    Args:
        outcomes: of the settings.
        max_staleness: the staleness of the first stage may be so many batches.

    Raises:
        ValueError: if no setting is within the bound.

    Example::

        >>> from lightning_stale.simulation import choose_pipeline, draw_stages, run_pipeline, usual_pipelines
        >>> times = draw_stages(4, 0.02, 0.04)
        >>> outcomes = [run_pipeline(setting, times, batches=500) for setting in usual_pipelines()]
        >>> choose_pipeline(outcomes, max_staleness=6).outcome.name
        'minimal@no-recompute'
    """
    allowed = [outcome for outcome in outcomes if max(outcome.staleness) <= max_staleness]
    if not allowed:
        least = min((max(outcome.staleness) for outcome in outcomes), default=0)
        raise ValueError(f"max_staleness={max_staleness}: every setting that is compared is staler; write {least}")
    exact = [outcome for outcome in allowed if max(outcome.staleness) == 0]
    baseline = max(exact, key=lambda outcome: outcome.rate, default=None)
    best = max(outcome.rate for outcome in allowed)
    if baseline is not None and best < WORTH * baseline.rate:
        return PipelineChoice(baseline, baseline, _keep(baseline, outcomes, allowed, max_staleness))
    alike = [outcome for outcome in allowed if outcome.rate >= ALIKE * best]
    chosen = min(alike, key=lambda outcome: (max(outcome.staleness), -outcome.rate))
    what = f"{100 * chosen.efficiency:.0f} % of what the slowest stage could do alone"
    stale = f"the first stage's gradients are {max(chosen.staleness)} batches stale (allowed: {max_staleness})"
    if baseline is None:
        return PipelineChoice(chosen, None, f"Choose {chosen.name}: it reaches {what}; {stale}.")
    gain = chosen.rate / baseline.rate
    sentence = (
        f"Choose {chosen.name}: {gain:.2f} times the batches/s of {baseline.name}, {what}; {stale}; {baseline.name} is "
        f"better if that staleness costs more than {gain:.2f} times the samples to the same accuracy, which no "
        "simulation of times can say."
    )
    return PipelineChoice(chosen, baseline, sentence)


def _keep(
    baseline: PipelineOutcome,
    outcomes: Sequence[PipelineOutcome],
    allowed: Sequence[PipelineOutcome],
    max_staleness: int,
) -> str:
    name = baseline.name
    sentence = f"Choose {name}: nothing within {max_staleness} batches of staleness is {100 * (WORTH - 1):.0f} % faster"
    nearest = max((outcome for outcome in allowed if max(outcome.staleness)), key=lambda o: o.rate, default=None)
    if nearest is not None:
        sentence += f" (the best is {nearest.name}, {nearest.rate / baseline.rate:.2f} times)"
    sentence += ", and its gradients are never stale"
    beyond = max(outcomes, key=lambda outcome: outcome.rate)
    if beyond.rate >= WORTH * baseline.rate:
        sentence += f"; {beyond.name} would be {beyond.rate / baseline.rate:.2f} times as fast"
    return f"{sentence}."
