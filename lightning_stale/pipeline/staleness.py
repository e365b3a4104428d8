"""Layer-wise staleness: how far the backward of each stage lags behind its forward (arXiv 1909.02625, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PRESETS = ("dsp", "minimal", "bp")


@dataclass(frozen=True)
class Staleness:
    """The staleness of every stage, and how many messages may wait between two of them.

    Attributes:
        m: ``m[k]``: in one iteration, stage ``k`` runs the forward of batch ``n`` and the backward of batch
            ``n - m[k]``.
        p: ``p[k]``: features that may wait between stage ``k`` and ``k + 1``; the last is 0.
        q: ``q[k]``: gradients that may wait between stage ``k`` and ``k - 1``; the first is 0.

    The paper's DSP(p; m) fixes ``q``: ``q[k + 1] = m[k] - m[k + 1] - p[k]``.
    """

    m: tuple[int, ...]
    p: tuple[int, ...]

    @property
    def stages(self) -> int:
        """The number of stages, ``K``."""
        return len(self.m)

    @property
    def q(self) -> tuple[int, ...]:
        """Gradients that may wait between stage ``k`` and ``k - 1``."""
        return (0, *(self.m[k] - self.m[k + 1] - self.p[k] for k in range(self.stages - 1)))

    @classmethod
    def of(cls, staleness: str | Sequence[int], stages: int, queues: Sequence[int] | None = None) -> Staleness:
        """Return the staleness that a user has asked for.

        Args:
            staleness: ``"bp"`` (all 0: back-propagation), ``"minimal"`` (``K-1-k``: the timing of Features Replay),
                ``"dsp"`` (``2(K-1-k)``: the paper's, with slack for slow messages and stragglers), or ``m`` itself.
            stages: ``K``.
            queues: ``p``, one per stage; by default half of what waits between two stages are features.

        Raises:
            ValueError: says which value is wrong, and what to write.

        Example::

            >>> from lightning_stale.pipeline.staleness import Staleness
            >>> dsp = Staleness.of("dsp", stages=3)
            >>> dsp.m, dsp.p, dsp.q
            ((4, 2, 0), (1, 1, 0), (0, 1, 1))
        """
        m = _presets(staleness, stages) if isinstance(staleness, str) else _checked(staleness, stages)
        between = [m[k] - m[k + 1] for k in range(stages - 1)]
        if queues is None:
            return cls(m, (*(-(-lag // 2) for lag in between), 0))
        p = tuple(queues)
        if len(p) != stages or any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in p) or p[-1] != 0:
            raise ValueError(
                f"queues={queues!r}: write one integer >= 0 per stage, the last 0, e.g. "
                f"queues={(*(-(-lag // 2) for lag in between), 0)}"
            )
        for k, lag in enumerate(between):
            if p[k] > lag:
                raise ValueError(
                    f"queues={queues!r}: queues[{k}] = {p[k]} features cannot wait between stages {k} and {k + 1}, "
                    f"since their staleness differs by {lag} only: write at most {lag}, or more staleness"
                )
        return cls(m, p)


def _presets(name: str, stages: int) -> tuple[int, ...]:
    if name == "bp":
        return (0,) * stages
    if name in ("minimal", "dsp"):
        step = 1 if name == "minimal" else 2
        return tuple(step * (stages - 1 - k) for k in range(stages))
    raise ValueError(
        f"staleness={name!r} is unknown: write one of {', '.join(map(repr, PRESETS))}, or a tuple such as "
        f"{_presets('dsp', stages)}"
    )


def _checked(staleness: Sequence[int], stages: int) -> tuple[int, ...]:
    m = tuple(staleness)
    example = _presets("dsp", stages)
    if len(m) != stages:
        raise ValueError(f"staleness={m} has {len(m)} values for {stages} stages: write one per stage, e.g. {example}")
    if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in m):
        raise ValueError(f"staleness={m}: write integers >= 0, e.g. {example}")
    if m[-1] != 0 or any(m[k] < m[k + 1] for k in range(stages - 1)):
        raise ValueError(
            f"staleness={m}: a stage cannot run its backward before the next one has; write non-increasing values that "
            f"end in 0, e.g. {example}"
        )
    return m
