"""``python -m lightning_stale simulate pipeline``: from the times of stages to a choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_stale.simulation.cluster import GIGABIT
from lightning_stale.simulation.pipeline.choice import PipelineChoice, choose_pipeline
from lightning_stale.simulation.pipeline.log import read_stage_log
from lightning_stale.simulation.pipeline.outcome import PipelineOutcome
from lightning_stale.simulation.pipeline.run import Costs, run_pipeline
from lightning_stale.simulation.pipeline.setting import PipelineSetting, parse_pipeline, usual_pipelines
from lightning_stale.simulation.pipeline.stage_times import StageTimes, draw_stages
from lightning_stale.simulation.tables import as_time

HELP = "predict what each setting makes of a pipeline, from the times of its stages"
LEGEND = (
    "/ own: batches/s over those of the slowest stage alone, without recomputation;\n"
    "busy %: each stage; waits %: mean of the stages, for features, gradients, room\n"
    "to send; stale: batches between forward and backward of the first stage"
)
_EPILOG = """\
Times are those of a log (--log: a CSV file with the columns stage, step, forward_s and backward_s), or drawn.

  python -m lightning_stale simulate pipeline --log stages.csv --message-ms 2
  python -m lightning_stale simulate pipeline --stages 4 --forward-ms 20 --backward-ms 40 --stragglers 0.33
"""
_MANY = 6
"""Of more stages than these, the table shows the least and the most busy one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``simulate pipeline`` takes to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = HELP, _EPILOG
    log = parser.add_argument_group("times of a log")
    log.add_argument("--log", type=Path, nargs="+", metavar="FILE", help="CSV (.gz) with the columns stage and step")
    log.add_argument("--job", help="where the log has a column job: which one")
    log.add_argument("--worker", help="where the log has a column worker: which one")
    drawn = parser.add_argument_group("times that are drawn")
    drawn.add_argument("--stages", type=int, metavar="K", help="how many")
    for what, default in (("forward", 20.0), ("backward", 40.0)):
        drawn.add_argument(
            f"--{what}-ms",
            type=float,
            nargs="+",
            default=[default],
            metavar="MS",
            help=f"median, of all stages or one per stage (default: {default:g})",
        )
    drawn.add_argument("--update-ms", type=float, default=0.0, metavar="MS", help="after each backward (default: 0)")
    drawn.add_argument("--jitter", type=float, default=0.05, metavar="S", help="log-normal (default: %(default)g)")
    drawn.add_argument("--stragglers", type=float, default=0.0, metavar="P", help="probability of a long operation")
    drawn.add_argument(
        "--straggler-factor", type=float, default=2.0, metavar="F", help="so long (default: %(default)g)"
    )
    costs = parser.add_argument_group("what it costs besides")
    for option, unit, text in (
        ("message-ms", "MS", "each message, however small"),
        ("features-mb", "MB", "features of a batch between two stages; needs --link-gbit"),
        ("link-gbit", "GBIT", "bandwidth between two stages, each way; needs --features-mb"),
        ("operation-ms", "MS", "part of a forward or backward that does not shrink with a microbatch"),
    ):
        costs.add_argument(f"--{option}", type=float, metavar=unit, help=text)
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--setting",
        action="append",
        metavar="NAME",
        help="bp, minimal, dsp or m itself (9,6,3,0), with @no-recompute to keep graphs; gpipe:8, 1f1b:8; repeat it "
        "(default: a few of each)",
    )
    compared.add_argument("--microbatches", type=int, default=8, metavar="M", help="of the default gpipe and 1f1b (8)")
    compared.add_argument("--batches", type=int, default=500, help="of an epoch (default: %(default)s)")
    compared.add_argument(
        "--max-staleness",
        type=int,
        metavar="B",
        help="choose among those whose first stage is at most so many batches stale (default: that of dsp, 2(K-1))",
    )
    compared.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it too (matplotlib; .png, .pdf, .svg)")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, and return the exit status.

    Example::

        >>> from lightning_stale.simulation.pipeline.command import main
        >>> main(["--stages", "4", "--batches", "0"])
        2
    """
    parser = argparse.ArgumentParser("python -m lightning_stale simulate pipeline")
    add_arguments(parser)
    options = parser.parse_args(argv)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        times, costs, settings, max_staleness = _read(options)
        outcomes = [run_pipeline(setting, times, costs, batches=options.batches) for setting in settings]
        choice = choose_pipeline(outcomes, max_staleness)
        if options.figure is not None:
            from lightning_stale.simulation.pipeline.figure import draw_pipelines

            draw_pipelines(options.figure, title(times), outcomes, choice)
    except (ValueError, OSError) as error:
        errors.print(f"simulate pipeline: {error}", markup=False)
        return 2
    except ModuleNotFoundError as error:
        errors.print(f"simulate pipeline: --figure needs matplotlib ({error}): pip install matplotlib", markup=False)
        return 2
    if options.json:
        print(json.dumps(_as_json(times, costs, outcomes, choice, max_staleness), indent=2))
    else:
        console = Console(width=80, highlight=False)
        console.print(title(times), markup=False)
        console.print(table(outcomes, choice))
        console.print(LEGEND, end="\n\n")
        console.print(choice.sentence, markup=False)
    return 0


def _read(options: argparse.Namespace) -> tuple[StageTimes, Costs, list[PipelineSetting], int]:
    if (options.log is None) == (options.stages is None):
        raise ValueError("write --log FILE for the times of a log, or --stages K to have some drawn")
    if (options.features_mb is None) != (options.link_gbit is None):
        raise ValueError("--features-mb and --link-gbit say together what a message takes: write both, or neither")
    if options.batches < 1:
        raise ValueError(f"--batches {options.batches}: write at least one")
    if options.link_gbit is not None and not options.link_gbit > 0:
        raise ValueError(f"--link-gbit {options.link_gbit:g}: write a number above 0")
    if options.log is not None:
        times = read_stage_log(*options.log, job=options.job, worker=options.worker)
    else:
        times = draw_stages(
            options.stages,
            [value / 1e3 for value in options.forward_ms],
            [value / 1e3 for value in options.backward_ms],
            update_s=options.update_ms / 1e3,
            jitter=options.jitter,
            stragglers=options.stragglers,
            straggler_factor=options.straggler_factor,
            batches=min(options.batches, 1000),
            seed=options.seed,
        )
    on_the_link = 0.0 if options.features_mb is None else options.features_mb * 1e6 / (options.link_gbit * GIGABIT)
    costs = Costs((options.message_ms or 0.0) / 1e3, on_the_link, (options.operation_ms or 0.0) / 1e3)
    if options.setting is None:
        settings = usual_pipelines(options.microbatches)
    else:
        settings = list(map(parse_pipeline, options.setting))
    most = 2 * (times.stages - 1) if options.max_staleness is None else options.max_staleness
    return times, costs, settings, most


def title(times: StageTimes) -> str:
    """Return what is simulated, in a line."""
    own = [times.own(stage) for stage in range(times.stages)]
    return (
        f"{times.name}: {times.stages} stages, the slowest {as_time(max(own))} "
        f"({max(own) * len(own) / sum(own):.2f} times the mean)"
    )


def table(outcomes: Sequence[PipelineOutcome], choice: PipelineChoice) -> Table:
    """Return the comparison, 80 columns wide at most; the choice has an arrow."""
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    result.add_column("", overflow="fold")
    baseline = choice.baseline
    versus = [] if baseline is None else [f"/ {baseline.name}"]
    for heading in ("batch", *versus, "/ own", "busy %", "waits %", "stale"):
        result.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        chosen = outcome is choice.outcome
        result.add_row(
            f"{'→' if chosen else ' '} {outcome.name}",
            as_time(outcome.seconds / outcome.batches),
            *([] if baseline is None else [f"{outcome.rate / baseline.rate:.2f}"]),
            f"{outcome.efficiency:.2f}",
            _busy(outcome),
            " ".join(f"{100 * outcome.mean_waiting(what):2.0f}" for what in outcome.waiting),
            str(max(outcome.staleness)),
            style="bold" if chosen else None,
        )
    return result


def _busy(outcome: PipelineOutcome) -> str:
    shares = outcome.utilisation
    if len(shares) > _MANY:
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"
    return " ".join(f"{100 * share:.0f}" for share in shares)


def _as_json(
    times: StageTimes, costs: Costs, outcomes: Sequence[PipelineOutcome], choice: PipelineChoice, max_staleness: int
) -> dict[str, Any]:
    return {
        "times": {"name": times.name, "own_s": [times.own(stage) for stage in range(times.stages)]},
        "costs": dict(vars(costs)),
        "max_staleness": max_staleness,
        "rows": [outcome.row() for outcome in outcomes],
        "choice": {
            "setting": choice.outcome.name,
            "baseline": None if choice.baseline is None else choice.baseline.name,
            "gain": choice.gain,
            "sentence": choice.sentence,
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
