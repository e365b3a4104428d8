"""The figures of contributing.md: ``python -m docs.figures.house``."""

from __future__ import annotations

from docs.figures.svg import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, SMALL, WIDTH, Figure, save


def _named(figure: Figure, x: float, y: float, width: float, name: str, what: str, edge: str = FAINT) -> None:
    figure.box(x, y, width, 44, PAPER, edge)
    figure.text(x + width / 2, y + 18, name, SMALL + 0.5, INK, at="middle", bold=True)
    figure.text(x + width / 2, y + 34, what, 11, FAINT, at="middle")


def house() -> Figure:
    """Draw the folders in layers; imports point downwards only."""
    figure = Figure("The map of the house: imports point downwards", 330)
    left, width = 4, WIDTH - 8
    layers: list[tuple[str, list[tuple[str, str]]]] = [
        ("what a Lightning user names", [("strategies", "the shells"), ("callbacks", "monitor, schedule")]),
        (
            "what a strategy is made of",
            [
                ("parameter_server", "weights, steps"),
                ("averaging", "HPSGD"),
                ("pipeline", "DSP"),
                ("launchers", "ranks"),
            ],
        ),
        (
            "what they stand on",
            [("coordinator", "who may go on"), ("transport", "how bytes move"), ("events", "what happened")],
        ),
        ("rules, pure", [("paradigms", "BSP, ASP, SSP, DSSP")]),
    ]
    weights = {"parameter_server": 1.45, "averaging": 0.95, "pipeline": 0.8, "launchers": 0.9}
    for number, (about, folders) in enumerate(layers):
        y = 6 + 82 * number
        figure.text(left, y + 11, about, 11.5, FAINT)
        total = sum(weights.get(name, 1.0) for name, _ in folders)
        x = float(left)
        for name, what in folders:
            share = width * weights.get(name, 1.0) / total
            pure = name in ("coordinator", "paradigms")
            _named(figure, x, y + 17, share - 4, name, what, GREEN if pure else FAINT)
            x += share
        if number < len(layers) - 1:
            figure.line([(WIDTH / 2, y + 63), (WIDTH / 2, y + 80)], INK, arrow=True)
    return figure


def _row(figure: Figure, y: float, where: str, what: list[str], colour: str, number: int) -> None:
    figure.dot(18, y + 13, colour, 11)
    figure.text(18, y + 17.5, str(number), SMALL, PAPER, at="middle", bold=True)
    figure.text(40, y + 10, where, SMALL + 0.5, INK, bold=True)
    figure.lines(40, y + 27, what, SMALL, FAINT)


def gradient() -> Figure:
    """Draw the way of a gradient from a worker's backward pass to the weights that come back."""
    figure = Figure("How a gradient travels", 500)
    figure.box(2, 2, 396, 122, "#eef4fb")
    figure.text(392, 20, "in the worker", SMALL, BLUE, at="end", bold=True)
    _row(
        figure,
        12,
        "backward",
        ["fills .grad, which lies in the push buffer (CPU)", "or is copied to pinned memory (GPU)"],
        BLUE,
        1,
    )
    _row(
        figure,
        72,
        "exchange",
        ["stands in for optimizer.step(): one message:", "which optimizer, learning rate, clipping"],
        BLUE,
        2,
    )
    figure.box(2, 132, 396, 66, "#f4f1ea")
    figure.text(392, 150, "between", SMALL, ORANGE, at="end", bold=True)
    _row(
        figure,
        142,
        "transport",
        ["same host: shared memory, nothing is sent.", "other hosts: encrypted stream, 4 MiB chunks"],
        ORANGE,
        3,
    )
    figure.box(2, 206, 396, 196, "#edf6f0")
    figure.text(392, 224, "in the server process", SMALL, GREEN, at="end", bold=True)
    _row(
        figure,
        216,
        "shard: apply rule",
        ["knows worker, staleness and gradient:", "apply it, scale it, correct it or drop it"],
        GREEN,
        4,
    )
    _row(
        figure,
        278,
        "shard: optimizer",
        ["the user's own takes one step (BSP: with the", "mean of a round); the version grows by one"],
        GREEN,
        5,
    )
    _row(
        figure,
        340,
        "coordinator: gate",
        ["the paradigm counts the push, and says who", "may go on now; others' OK is held back"],
        GREEN,
        6,
    )
    figure.box(2, 410, 396, 86, "#eef4fb")
    figure.text(392, 428, "in the worker again", SMALL, BLUE, at="end", bold=True)
    _row(
        figure,
        424,
        "OK, and pull",
        [
            "the newest weights come with it; in manual",
            "optimization, those that others have changed",
            "come after the batch, when no graph is alive",
        ],
        BLUE,
        7,
    )
    for y, end in ((38, 71), (98, 141), (168, 215), (242, 277), (304, 339), (366, 423)):
        figure.line([(18, y), (18, end)], FAINT, arrow=True)
    return figure


def feature() -> Figure:
    """Draw the way of a feature through three stages and of its gradient back."""
    figure = Figure("How a feature travels", 334)
    stages = [("stage 0", "rank 2", 40), ("stage 1", "rank 1", 152), ("stage 2", "rank 0", 264)]
    figure.text(2, 18, "batch n", SMALL, INK, bold=True)
    figure.line([(20, 24), (20, 70), (38, 70)], BLUE, arrow=True)
    for name, rank, y in stages:
        last = name == "stage 2"
        figure.box(40, y, 140, 60, "#eef4fb", BLUE)
        figure.text(110, y + 17, f"{name}: forward", SMALL, BLUE, at="middle", bold=True)
        figure.text(110, y + 34, "the graph is kept" if last else "the input is kept,", 11, FAINT, at="middle")
        figure.text(110, y + 49, f"({rank})" if last else f"no graph ({rank})", 11, FAINT, at="middle")
        figure.box(238, y, 160, 60, "#fdf3ea", ORANGE)
        figure.text(318, y + 17, f"{name}: backward", SMALL, ORANGE, at="middle", bold=True)
        figure.text(318, y + 34, "backward" if last else "forward again, backward", 11, FAINT, at="middle")
        figure.text(318, y + 49, "optimizer step", 11, FAINT, at="middle")
    for y in (100, 212):
        figure.line([(110, y), (110, y + 51)], BLUE, arrow=True)
        figure.lines(117, y + 22, ["channel: feature", "with its number"], 11, BLUE)
        figure.line([(318, y + 52), (318, y + 1)], ORANGE, arrow=True)
        figure.lines(311, y + 22, ["channel:", "its gradient"], 11, ORANGE, at="end")
    figure.line([(180, 294), (237, 294)], INK, arrow=True)
    figure.text(206, 288, "loss", SMALL, INK, at="middle", bold=True)
    return figure


FIGURES = {"house": house, "gradient": gradient, "feature": feature}


def figures() -> dict[str, Figure]:
    """Return all of them by name."""
    return {name: draw() for name, draw in FIGURES.items()}


if __name__ == "__main__":
    save(figures())
