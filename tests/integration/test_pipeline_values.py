"""Between processes, features arrive as they would on virtual stages, and back-propagation is the plain Trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_stale import DSPStrategy
from tests.integration.harness import run_workers
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.forwards import CASES, WIDTH, Model, loader
from tests.unit.pipeline.test_values import Frozen, Output, Unwraps, Wraps, sparse


def wrapped(wrap: Any, read: Any) -> nn.Sequential:
    """Return two blocks between which a value of some type travels."""
    one, two = Wraps(wrap), Unwraps(read)
    one.linear, two.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(one, two)


def hidden(value: Any) -> Any:
    return value.hidden


def last_hidden_state(value: Any) -> Any:
    return value.last_hidden_state


def output(x: Any) -> Any:
    return Output(last_hidden_state=x)


def adjacency(x: Any) -> Any:
    return sparse(x[0].detach().abs() @ x[0].detach().abs().t()), x


def propagated(value: Any) -> Any:
    graph, x = value
    return torch.stack([torch.sparse.mm(graph, rows) for rows in x])


WRAPPED: dict[str, Any] = {
    "dataclass": (Frozen, hidden),
    "ModelOutput": (output, last_hidden_state),
    "sparse": (adjacency, propagated),
}
KNOWN = ["mask", "channels_last", "complex", "packed", "batch norm, in place", "twice", "max_norm", "frozen"]


class Wrapped(Model):
    def __init__(self, case: str) -> None:
        super().__init__("twice")
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.net = wrapped(*WRAPPED[case])


def fit(world_size: int, case: str, strategy: Any) -> Any:
    model = Wrapped(case) if case in WRAPPED else Model(case)
    held = dict(model.named_parameters())
    t = trainer(world_size, strategy, max_epochs=1, val_check_interval=2)
    t.fit(model, loader(4), loader(2, seed=9))
    kept = [name for name, parameter in model.named_parameters() if parameter is held[name]]
    return weights(model), model.evaluated, kept


def strategy(case: str, stages: int | None, **options: Any) -> DSPStrategy:
    split = [1] if case in WRAPPED else [CASES[case].split[0]]
    return DSPStrategy(stages=stages, split=split, module="net", **options)


def ways(world_size: int, stages: int | None) -> list[Any]:
    """Return what each case trains, with back-propagation and from stale features."""
    return [
        fit(world_size, case, strategy(case, stages, **options))
        for case in [*KNOWN, *WRAPPED]
        for options in ({"staleness": "bp"}, {"staleness": (2, 0), "recompute": False}, {"staleness": (2, 0)})
    ]


def on_ranks(rank: int) -> list[Any]:
    return ways(2, None)


def alone(rank: int) -> tuple[list[Any], list[Any]]:
    return [fit(1, case, "auto") for case in [*KNOWN, *WRAPPED]], ways(1, 2)


def test_processes_train_what_virtual_stages_and_the_plain_trainer_do(tmp_path: Path) -> None:
    last, first = run_workers(on_ranks, 2, tmp_path / "ranks")
    ((plain, virtual),) = run_workers(alone, 1, tmp_path / "alone")
    for real, same in zip(last, virtual, strict=True):
        assert_same(same[0], real[0])
        assert same[1] == real[1]
    for case, real in zip(plain, last[::3], strict=True):
        assert_same(case[0], real[0])
        assert case[1] == real[1]
    for (_, _, mine), (_, _, theirs), (_, _, whole) in zip(last, first, virtual, strict=True):
        assert set(mine) | set(theirs) == set(whole), "every parameter is, where it was trained, the one that came in"
