"""Which setting is worth its staleness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_stale.simulation.outcome import Outcome

WORTH = 1.05
"""Less than so many times the speed of DDP is not worth any staleness."""

ALIKE = 0.98
"""Of those that reach this share of the best speed, the one with the least staleness is taken."""


@dataclass(frozen=True)
class Choice:
    """The setting that is chosen, and why.

    Args:
        outcome: of it.
        gain: its batches per second, over those of DDP.
        sentence: for people.
    """

    outcome: Outcome
    gain: float
    sentence: str


def choose(ddp: Outcome, outcomes: Sequence[Outcome], max_staleness: int) -> Choice:
    """Return the fastest within a bound on staleness; of those that are about as fast, the least stale.

    It knows of speed, and of staleness no more than how large it is. What a stale gradient is worth depends on the
    model, the learning rate and the apply rule; so the sentence says how many more samples the choice may need until
    it is no better than DDP.

    Args:
        ddp: of the baseline.
        outcomes: of the settings.
        max_staleness: the 99 % quantile of the staleness may be so many updates.

    Example::

        >>> from lightning_stale.simulation import Setting, choose, draw, run, run_ddp
        >>> times = draw(4, 1.0, steps=50)
        >>> choose(run_ddp(times), [run(Setting.parse("asp"), times)], max_staleness=12).outcome.name
        'ddp'
    """
    allowed = [outcome for outcome in outcomes if outcome.quantile(0.99) <= max_staleness]
    best = max([ddp.rate, *(outcome.rate for outcome in allowed)])
    if best < WORTH * ddp.rate:
        return Choice(ddp, 1.0, _keep_ddp(ddp, outcomes, allowed, max_staleness))
    alike = [outcome for outcome in allowed if outcome.rate >= ALIKE * best]
    chosen = min(alike, key=lambda outcome: (outcome.mean_staleness, -outcome.rate))
    gain = chosen.rate / ddp.rate
    sentence = (
        f"Choose {chosen.name}: {gain:.2f} times the samples/s of ddp, {100 * chosen.efficiency:.0f} % of what the "
        f"workers could do alone, and 99 % of the gradients are at most {chosen.quantile(0.99)} updates stale "
        f"(allowed: {max_staleness}); ddp is better if that staleness costs more than {gain:.2f} times the samples to "
        "the same accuracy, which no simulation of times can say."
    )
    return Choice(chosen, gain, sentence)


def _keep_ddp(ddp: Outcome, outcomes: Sequence[Outcome], allowed: Sequence[Outcome], max_staleness: int) -> str:
    within = f"within {max_staleness} updates of staleness (99 %)"
    sentence = f"Choose ddp: nothing {within} is {100 * (WORTH - 1):.0f} % faster"
    if allowed:
        nearest = max(allowed, key=lambda outcome: outcome.rate)
        sentence += f" (the best is {nearest.name}, {nearest.rate / ddp.rate:.2f} times)"
    sentence += ", and its gradients are never stale"
    beyond = max(outcomes, key=lambda outcome: outcome.rate, default=ddp)
    if beyond.rate >= WORTH * ddp.rate:
        sentence += (
            f"; {beyond.name} would be {beyond.rate / ddp.rate:.2f} times as fast, with {beyond.quantile(0.99)} updates"
        )
    return f"{sentence}."
