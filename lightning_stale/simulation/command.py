"""``python -m lightning_stale simulate``: from step times to a choice."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_stale.recording.log import is_record, read
from lightning_stale.simulation.choice import Choice, choose
from lightning_stale.simulation.cluster import Cluster
from lightning_stale.simulation.ddp import run_ddp
from lightning_stale.simulation.log import read_log
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.pipeline import command as pipeline
from lightning_stale.simulation.recorded import step_times_of
from lightning_stale.simulation.run import run
from lightning_stale.simulation.setting import AveragingSetting, Setting, parse_setting, usual
from lightning_stale.simulation.step_times import StepTimes, draw
from lightning_stale.simulation.tables import as_time

HELP = "predict what each paradigm makes of a cluster, from step times"
LEGEND = (
    "/ ddp, / own: samples/s over those of ddp, and over those of the workers, each\n"
    "alone; staleness of gradients, in updates: mean, 99 %, max; server: how busy"
)
_EPILOG = """\
Of the stages of a pipeline (dsp, 1f1b): python -m lightning_stale simulate pipeline --help.
Step times are those of a log (--log: a CSV file with the columns worker, step, compute_s, or the record of a run, which
has the cost of its exchanges too), or drawn (--workers ...).

  python -m lightning_stale simulate --log steps.csv.gz --exchange-ms 12
  python -m lightning_stale simulate --log staleness.record
  python -m lightning_stale simulate --workers 8 --step-ms 120 --slow 2.3 --jitter 0.1 --model-mb 400 --link-gbit 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``simulate`` takes to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = HELP, _EPILOG
    log = parser.add_argument_group("step times of a log")
    log.add_argument(
        "--log",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="CSV (.gz) with the columns worker and step, or the record of a run",
    )
    log.add_argument("--job", help="where the log has a column job: which one")
    log.add_argument("--column", default="compute_s", help="of the log, with the seconds (default: %(default)s)")
    drawn = parser.add_argument_group("step times that are drawn")
    drawn.add_argument("--workers", type=int, metavar="N", help="how many")
    drawn.add_argument("--step-ms", type=float, default=100.0, metavar="MS", help="median (default: %(default)g)")
    drawn.add_argument(
        "--slow", type=float, action="append", default=[], metavar="F", help="one worker is F times slower; repeat it"
    )
    drawn.add_argument("--jitter", type=float, default=0.05, metavar="S", help="log-normal (default: %(default)g)")
    drawn.add_argument("--stragglers", type=float, default=0.0, metavar="P", help="probability of a long step")
    drawn.add_argument(
        "--straggler-factor", type=float, default=5.0, metavar="F", help="so long (default: %(default)g)"
    )
    cluster = parser.add_argument_group("the cluster")
    for option, unit, text in (
        ("model-mb", "MB", "the weights; a gradient is as large"),
        ("exchange-ms", "MS", "what an exchange takes besides, from push to OK"),
        ("link-gbit", "GBIT", "bandwidth of a worker, each way"),
        ("server-gbit", "GBIT", "bandwidth of the server, each way, for all together"),
        ("update-ms", "MS", "the server's time for one update, or HPSGD's for a round"),
        ("all-reduce-ms", "MS", "DDP's and HPSGD's exchange (default: a ring over the links)"),
        ("deaths-per-hour", "R", "of a worker; worker 0 is spared"),
        ("back-after-s", "S", "until another takes its place, inf for never"),
        ("checkpoint-s", "S", "from one checkpoint to the next"),
    ):
        cluster.add_argument(f"--{option}", type=float, metavar=unit, help=text)
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--setting",
        action="append",
        metavar="NAME",
        help="bsp, asp, ssp:3, dssp:3:15, hpsgd, hpsgd:4, with @on-demand for data on demand; bounded-delay:8, "
        "bounded-delay:auto; repeat it (default: a few of each)",
    )
    compared.add_argument("--steps", type=int, default=500, help="of each worker in an epoch (default: %(default)s)")
    compared.add_argument("--epochs", type=int, default=1, help="(default: %(default)s)")
    compared.add_argument(
        "--max-staleness",
        type=int,
        metavar="U",
        help="choose among those whose gradients are at most so many updates stale, 99 %% of them (default: 3 N)",
    )
    compared.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it too (matplotlib; .png, .pdf, .svg)")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, and return the exit status.

    Example::

        >>> from lightning_stale.simulation.command import main
        >>> main(["--workers", "2", "--steps", "0"])
        2
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["pipeline"]:
        return pipeline.main(given[1:])
    parser = argparse.ArgumentParser("python -m lightning_stale simulate")
    add_arguments(parser)
    return simulate(parser.parse_args(given))


def simulate(options: argparse.Namespace) -> int:
    """Do what parsed arguments say; return the exit status."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        times, cluster, settings, max_staleness = _read(options)
        how: dict[str, Any] = {"steps": options.steps, "epochs": options.epochs, "seed": options.seed}
        shown = track(settings, "simulating", console=errors, transient=True, disable=not errors.is_terminal)
        outcomes = [run(setting, times, cluster, **how) for setting in shown]
        ddp = run_ddp(times, cluster, **how)
        choice = choose(ddp, outcomes, max_staleness)
        if options.figure is not None:
            from lightning_stale.simulation.figure import draw_figure

            draw_figure(options.figure, times, ddp, outcomes, choice, max_staleness)
    except (ValueError, OSError) as error:
        errors.print(f"simulate: {error}", markup=False)
        return 2
    except ModuleNotFoundError as error:
        errors.print(f"simulate: --figure needs matplotlib ({error}): pip install matplotlib", markup=False)
        return 2
    if options.json:
        print(json.dumps(_as_json(times, cluster, ddp, outcomes, choice, max_staleness), indent=2))
    else:
        console = Console(width=80, highlight=False)
        console.print(f"{times.name}: {times.workers} workers, the slowest {times.slowest:.2f} times the median")
        console.print(table(ddp, outcomes, choice))
        console.print(LEGEND, end="\n\n")
        console.print(choice.sentence, markup=False)
    return 0


def _read(options: argparse.Namespace) -> tuple[StepTimes, Cluster, list[Setting | AveragingSetting], int]:
    if (options.log is None) == (options.workers is None):
        raise ValueError("write --log FILE for the step times of a log, or --workers N to have some drawn")
    if options.steps < 1 or options.epochs < 1:
        raise ValueError(f"--steps {options.steps} --epochs {options.epochs}: write at least one of each")
    cluster = Cluster()
    if options.log is not None:
        times, cluster = _logged(options)
    else:
        times = draw(
            options.workers,
            options.step_ms / 1e3,
            factors=options.slow,
            jitter=options.jitter,
            stragglers=options.stragglers,
            straggler_factor=options.straggler_factor,
            steps=max(1, min(options.steps * options.epochs, 1000)),
            seed=options.seed,
        )
    given = {
        "model_bytes": (options.model_mb, 1e6),
        "exchange_s": (options.exchange_ms, 1e-3),
        "link_gbit": (options.link_gbit, 1),
        "server_gbit": (options.server_gbit, 1),
        "update_s": (options.update_ms, 1e-3),
        "all_reduce_s": (options.all_reduce_ms, 1e-3),
        "deaths_per_hour": (options.deaths_per_hour, 1),
        "back_after_s": (options.back_after_s, 1),
        "checkpoint_s": (options.checkpoint_s, 1),
    }
    cluster = replace(cluster, **{name: value * unit for name, (value, unit) in given.items() if value is not None})
    settings = usual(times.workers) if options.setting is None else list(map(parse_setting, options.setting))
    return times, cluster, settings, 3 * times.workers if options.max_staleness is None else options.max_staleness


def _logged(options: argparse.Namespace) -> tuple[StepTimes, Cluster]:
    """Return the step times of ``--log``, and of a recorded run, what its exchanges cost."""
    first = options.log[0]
    if not is_record(first):
        return read_log(*options.log, job=options.job, column=options.column), Cluster()
    if len(options.log) > 1:
        raise ValueError(f"--log {first}: it is the record of a whole run: name no other file")
    recorded = step_times_of(read(first)[1], name=Path(first).name)
    return recorded.computing, recorded.cluster


def table(ddp: Outcome, outcomes: Sequence[Outcome], choice: Choice) -> Table:
    """Return the comparison, 80 columns wide at most; the choice has an arrow."""
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    result.add_column("", overflow="fold")
    for heading in ("epoch", "/ ddp", "/ own", "waiting", "stale", "99 %", "max", "server"):
        result.add_column(heading, justify="right", no_wrap=True)
    for outcome in (ddp, *outcomes):
        chosen = outcome is choice.outcome
        result.add_row(
            f"{'→' if chosen else ' '} {outcome.name}",
            as_time(outcome.epoch_s),
            f"{outcome.rate / ddp.rate:.2f}",
            f"{outcome.efficiency:.2f}",
            f"{outcome.waiting:.1%}",
            f"{outcome.mean_staleness:.1f}",
            str(outcome.quantile(0.99)),
            str(outcome.max_staleness),
            "" if outcome.server_load is None else f"{outcome.server_load:.0%}",
            style="bold" if chosen else None,
        )
    return result


def _as_json(
    times: StepTimes,
    cluster: Cluster,
    ddp: Outcome,
    outcomes: Sequence[Outcome],
    choice: Choice,
    max_staleness: int,
) -> dict[str, Any]:
    finite = {name: None if value == math.inf else value for name, value in vars(cluster).items()}
    return {
        "times": {"name": times.name, "workers": times.workers, "own_batches_per_s": times.own_rates},
        "cluster": finite,
        "max_staleness": max_staleness,
        "rows": [outcome.row() for outcome in (ddp, *outcomes)],
        "choice": {"setting": choice.outcome.name, "gain": choice.gain, "sentence": choice.sentence},
    }


if __name__ == "__main__":
    raise SystemExit(main())
