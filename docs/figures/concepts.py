"""The figures of concepts.md and hpsgd.md: ``python -m docs.figures.concepts``.

Who waits for whom is not drawn by hand: the paradigms and the schedule of this package say it.
"""

from __future__ import annotations

from dataclasses import dataclass

from docs.figures.svg import BLUE, FAINT, GREEN, INK, ORANGE, PALE, PAPER, SMALL, WIDTH, WORKERS, Figure, save
from lightning_stale.paradigms import ASP, SSP, Paradigm
from lightning_stale.pipeline.schedule import iteration
from lightning_stale.pipeline.staleness import Staleness

LEFT = 72
NAMES = ("worker 0", "worker 1", "worker 2")


@dataclass
class Step:
    """One step of a worker: it pulls, computes, pushes, and waits for its OK. Times without a unit."""

    worker: int
    started: float
    pushed: float
    pulled: int  # the version of the weights
    version: int  # after the push
    clock: int
    lead: int
    released: float | None = None

    @property
    def staleness(self) -> int:
        """How many updates of others the server has applied between pull and push."""
        return self.version - 1 - self.pulled


def run(paradigm: Paradigm, durations: list[list[float]], until: float) -> list[Step]:
    """Return the steps of workers whose steps take ``durations`` (the last one again and again) up to ``until``."""
    steps: list[Step] = []
    working = dict.fromkeys(range(len(durations)), (0.0, 0))  # since when, and on which weights
    waiting: dict[int, Step] = {}
    version = 0
    for worker in working:
        paradigm.join(worker, 0.0)
    while working:

        def end(worker: int) -> float:
            of_worker = durations[worker]
            return working[worker][0] + of_worker[min(paradigm.clocks[worker], len(of_worker) - 1)]

        worker = min(working, key=end)
        now = end(worker)
        if now > until:
            break
        started, pulled = working.pop(worker)
        version += 1
        released = paradigm.push(worker, now)
        step = Step(worker, started, now, pulled, version, paradigm.clocks[worker], paradigm.lead(worker))
        steps.append(step)
        waiting[worker] = step
        for one in released:
            waiting.pop(one).released = now
            working[one] = (now, version)
    return steps


def timeline(figure: Figure, steps: list[Step], top: float, scale: float, until: float, labels: bool = True) -> None:
    """Draw a row per worker: a bar per step with the clock after it, and grey where the worker waits."""
    for worker, name in enumerate(NAMES):
        figure.text(4, top + 42 * worker + 17, name, SMALL, WORKERS[worker], bold=True)
    for step in steps:
        y = top + 42 * step.worker
        x, width = LEFT + scale * step.started, scale * (step.pushed - step.started)
        figure.box(x + 1, y, width - 2, 25, WORKERS[step.worker])
        if labels:
            figure.text(x + width / 2, y + 17, str(step.clock), SMALL, PAPER, at="middle", bold=True)
        freed = until if step.released is None else step.released
        if freed > step.pushed:
            figure.box(x + width + 1, y, scale * (freed - step.pushed) - 2, 25, PALE, FAINT, dashed=True)


def clock() -> Figure:
    """Draw three workers that nobody holds back, and how many pushes each has made."""
    until, scale = 9.0, 31.0
    steps = run(ASP(), [[1.0], [1.0, 1.0, 2.6, 1.0], [2.1]], until)
    figure = Figure("Clocks of three workers", 196)
    figure.text(LEFT, 15, "a bar is a step; it ends with a push", SMALL, FAINT)
    timeline(figure, steps, 28, scale, until)
    x = LEFT + scale * until
    figure.line([(x, 24), (x, 142)], INK)
    figure.text(x, 160, "now", SMALL, INK, at="middle")
    for worker in range(3):
        clocks = [step.clock for step in steps if step.worker == worker]
        figure.text(x + 7, 28 + 42 * worker + 18, f"t = {max(clocks)}", colour=WORKERS[worker], bold=True)
    figure.line([(LEFT, 172), (x, 172)], FAINT, arrow=True)
    figure.text(LEFT, 188, "time", SMALL, FAINT)
    return figure


def lead() -> Figure:
    """Draw the same workers under SSP(2): who is more than two clocks ahead waits."""
    until, scale = 9.0, 35.0
    steps = run(SSP(threshold=2), [[1.0], [1.0, 1.0, 2.6, 1.0], [2.1]], until)
    figure = Figure("Leads under SSP with a threshold of 2", 206)
    figure.text(LEFT, 15, "below a bar: its lead. SSP(2) holds back a lead of 3", SMALL, FAINT)
    timeline(figure, steps, 26, scale, until)
    for step in steps:
        x, y = LEFT + scale * step.pushed, 26 + 42 * step.worker + 37.5
        held = step.released is None or step.released > step.pushed
        figure.text(x - 3, y, f"+{step.lead}" if step.lead else "0", 11.5, INK if held else FAINT, at="end", bold=held)
    figure.box(LEFT, 163, 26, 13, PALE, FAINT, dashed=True)
    figure.text(LEFT + 33, 174, "waits for the OK", SMALL, FAINT)
    figure.line([(LEFT, 188), (LEFT + scale * until, 188)], FAINT, arrow=True)
    figure.text(LEFT, 203, "time", SMALL, FAINT)
    return figure


def staleness() -> Figure:
    """Draw the updates of the server, and between which of them a worker pulls and pushes."""
    until, scale, row = 5.02, 60.0, 56.0
    steps = run(ASP(), [[1.0, 1.4], [1.5, 1.4, 1.6], [1.95, 3.05]], until)
    figure = Figure("Staleness of a gradient", 258)
    figure.text(4, 45, "server", SMALL, INK, bold=True)
    figure.text(LEFT, 15, "updates, in the order of the pushes", SMALL, FAINT)
    figure.line([(LEFT, 41), (WIDTH - 6, 41)], INK, arrow=True)
    shown = next(step for step in steps if step.worker == 2 and step.clock == 2)
    for worker, name in enumerate(NAMES):
        figure.text(4, 78 + row * worker + 17, name, SMALL, WORKERS[worker], bold=True)
    for step in steps:
        x, colour = LEFT + scale * step.pushed, WORKERS[step.worker]
        y = 78 + row * step.worker
        figure.box(LEFT + scale * step.started + 1, y, scale * (step.pushed - step.started) - 2, 25, colour)
        figure.line([(x, y), (x, 52)], colour, dashed=step is not shown)
        figure.dot(x, 41, colour, 9)
        figure.text(x, 45.2, str(step.version), 11.5, PAPER, at="middle", bold=True)
    from_x, to_x = LEFT + scale * shown.started, LEFT + scale * shown.pushed
    y = 78 + 2 * row
    figure.text((from_x + to_x) / 2, y + 17, "computes", SMALL, PAPER, at="middle", bold=True)
    figure.text(from_x, y + 40, f"pulls {shown.pulled}", SMALL, GREEN, at="middle", bold=True)
    figure.text(to_x + 12, y + 40, f"pushes {shown.version}", SMALL, GREEN, at="end", bold=True)
    between = ", ".join(str(n) for n in range(shown.pulled + 1, shown.version))
    figure.text(LEFT, 252, f"{between} came between: its staleness is {shown.staleness}", 13, INK)
    return figure


def delay() -> Figure:
    """Draw what three stages of DSP do in their first iterations, from the schedule itself."""
    m = Staleness.of("dsp", stages=3).m
    columns, left, cell = 7, 58, 48
    figure = Figure("Delay in a pipeline of three stages", 254)
    figure.text(left, 14, "iteration of the stage", SMALL, FAINT)
    for n in range(columns):
        figure.text(left + cell * n + 23, 32, str(n), SMALL, FAINT, at="middle")
    for stage in range(3):
        y = 40 + 62 * stage
        figure.text(2, y + 18, f"stage {stage}", SMALL, INK, bold=True)
        figure.text(2, y + 38, f"m = {m[stage]}", SMALL, FAINT)
        for n in range(columns):
            done = {operation.kind: operation.batch for operation in iteration(n, m[stage])}
            x = left + cell * n
            for kind, dy, colour in (("forward", 0, BLUE), ("backward", 25, ORANGE)):
                batch = done.get(kind)
                if batch is None:
                    figure.box(x + 1, y + dy, cell - 4, 23, PAPER, PALE)
                    continue
                first = batch == 0
                figure.box(x + 1, y + dy, cell - 4, 23, colour if first else PALE)
                letter = "F" if kind == "forward" else "B"
                figure.text(
                    x + 23, y + dy + 16, f"{letter} {batch}", SMALL, PAPER if first else INK, at="middle", bold=first
                )
    figure.lines(
        left,
        236,
        ["F n: forward of batch n.  B n: backward and step.", "Batch 0 in colour: stage 0 waits 4 iterations for it."],
        colour=INK,
    )
    return figure


def hpsgd() -> Figure:
    """Draw two ranks that train while the average of the round before travels."""
    figure = Figure("Rounds of HPSGD", 232)
    left, width = 60, 80
    names = ["round 0", "round 1", "round 2", "round 3"]
    for number, name in enumerate(names):
        figure.text(left + width * number + width / 2, 16, name, SMALL, FAINT, at="middle")
    for rank, colour in ((0, BLUE), (1, ORANGE)):
        y = 26 + 36 * rank
        figure.text(2, y + 17, f"rank {rank}", SMALL, colour, bold=True)
        for number in range(4):
            x = left + width * number
            steps = (3, 3, 3, 3) if rank == 0 else (2, 3, 2, 3)
            for step in range(steps[number]):
                each = width / steps[number]
                figure.box(x + each * step + 1, y, each - 2, 25, colour)
    figure.text(2, 124, "travels", SMALL, GREEN, bold=True)
    for number in range(1, 4):
        x = left + width * number
        figure.box(x + 2, 108, width - 16, 24, GREEN)
        figure.text(x + (width - 12) / 2, 124, f"mean D{number - 1}", SMALL, PAPER, at="middle", bold=True)
        figure.line([(x, 90), (x, 107)], FAINT, arrow=True)
        figure.line([(x + width - 12, 133), (x + width - 3, 150)], GREEN, arrow=True)
        figure.text(x + width - 4, 165, f"W{number}", SMALL, GREEN, at="middle", bold=True)
    figure.lines(
        2,
        190,
        [
            "D0: how far a rank's replica has moved in round 0. Its mean is",
            "under way in round 1, which trains on, and goes into the global",
            "weights W1 at its end: one round late, and exactly once.",
        ],
        colour=INK,
    )
    return figure


FIGURES = {"clock": clock, "lead": lead, "staleness": staleness, "delay": delay, "hpsgd": hpsgd}


def figures() -> dict[str, Figure]:
    """Return all of them by name."""
    return {name: draw() for name, draw in FIGURES.items()}


if __name__ == "__main__":
    save(figures())
