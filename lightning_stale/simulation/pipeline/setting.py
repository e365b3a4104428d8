"""How a pipeline is run: what the simulator compares, and how to write it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_stale.pipeline.schedule import Operation
from lightning_stale.pipeline.staleness import PRESETS, Staleness

Schedule = Literal["gpipe", "1f1b"]


@dataclass(frozen=True)
class DSPSetting:
    """A setting of ``DSPStrategy``.

    Args:
        name: as it is written: ``"dsp"``, ``"minimal@no-recompute"``, ``"9,6,3,0"``.
        staleness: ``"dsp"``, ``"minimal"``, ``"bp"``, or ``m`` itself.
        recompute: whether a stage runs its forward again before its backward.
        queues: how many features may wait, one number per stage; by default as the strategy has it.
    """

    name: str
    staleness: str | tuple[int, ...] = "dsp"
    recompute: bool = True
    queues: tuple[int, ...] | None = None

    def of(self, stages: int) -> Staleness:
        """Return the staleness of each stage.

        Raises:
            ValueError: if it is none for so many stages.
        """
        return Staleness.of(self.staleness, stages, self.queues)


@dataclass(frozen=True)
class FlushingSetting:
    """A pipeline that cuts each batch into microbatches and is empty before each step: no gradient is stale.

    Args:
        name: as it is written: ``"1f1b:8"``, ``"gpipe:16"``.
        schedule: GPipe (arXiv 1811.06965: all forwards, then all backwards) or 1F1B (arXiv 2104.04473, as
            ``torch.distributed.pipelining`` has it: as many forwards as there are stages left, then one of each).
        microbatches: of a batch.
    """

    name: str
    schedule: Schedule
    microbatches: int

    def operations(self, stage: int, stages: int) -> Iterator[Operation]:
        """Yield what a stage does with the microbatches of a batch.

        Example::

            >>> from lightning_stale.simulation.pipeline.setting import FlushingSetting
            >>> setting = FlushingSetting("1f1b:3", "1f1b", microbatches=3)
            >>> " ".join(f"{operation.kind[0]}{operation.batch}" for operation in setting.operations(1, stages=3))
            'f0 f1 b0 f2 b1 b2'
        """
        all_at_first = self.schedule == "gpipe"
        ahead = self.microbatches if all_at_first else min(self.microbatches, stages - stage)
        for number in range(self.microbatches + ahead):
            if number >= ahead:
                yield Operation("backward", number - ahead)
            if number < self.microbatches:
                yield Operation("forward", number)


PipelineSetting = DSPSetting | FlushingSetting


def parse_pipeline(text: str) -> PipelineSetting:
    """Return the setting that ``text`` names.

    Raises:
        ValueError: if it names none, with what to write.

    Example::

        >>> from lightning_stale.simulation import parse_pipeline
        >>> parse_pipeline("4,2,0@no-recompute").of(stages=3).q
        (0, 1, 1)
        >>> parse_pipeline("1f1b:8").microbatches
        8
    """
    given, _, how = text.strip().lower().partition("@")
    schedule, _, count = given.partition(":")
    try:
        if schedule in ("gpipe", "1f1b"):
            if how:
                raise ValueError(f"{schedule} keeps its graphs for a batch, and recomputes nothing")
            microbatches = int(count or 8)
            if microbatches < 1:
                raise ValueError(f"{microbatches} microbatches are none")
            return FlushingSetting(
                f"{schedule}:{microbatches}", "gpipe" if schedule == "gpipe" else "1f1b", microbatches
            )
        if how not in ("", "recompute", "no-recompute"):
            raise ValueError("after @ write recompute or no-recompute")
        staleness = given if given in PRESETS else tuple(int(value) for value in given.split(","))
    except ValueError as error:
        raise ValueError(
            f"setting {text!r}: {error}. Write one of {', '.join(PRESETS)} or m itself, e.g. 6,4,2,0, with "
            "@no-recompute after it to keep the graphs; or 1f1b:8, gpipe:8 with a number of microbatches"
        ) from None
    return DSPSetting(given if how != "no-recompute" else f"{given}@no-recompute", staleness, how != "no-recompute")


def usual_pipelines(microbatches: int = 8) -> list[PipelineSetting]:
    """Return what is compared if nothing else is asked for.

    Example::

        >>> from lightning_stale.simulation import usual_pipelines
        >>> [setting.name for setting in usual_pipelines()]
        ['gpipe:8', '1f1b:8', 'bp', 'minimal', 'dsp', 'minimal@no-recompute', 'dsp@no-recompute']
    """
    names = [f"gpipe:{microbatches}", f"1f1b:{microbatches}", "bp"]
    return [*map(parse_pipeline, (*names, "minimal", "dsp", "minimal@no-recompute", "dsp@no-recompute"))]
