"""Whatever a forward does, a pipeline trains all of its weights, and as the plain Trainer does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stale import DSPStrategy
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Stage
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.forwards import CASES, Model, Snapshots, Twice, loader, rows

TRACED = [name for name in CASES if name not in ("packed", "compiled")]
WAYS = [
    *(
        pytest.param(case, optimizer, False, id=f"{case}-{optimizer}")
        for case in CASES
        for optimizer in ("SGD", "Adam")
    ),
    *(pytest.param(case, "SGD", True, id=f"{case}-traced") for case in TRACED),
]


def fit(case: str, strategy: Any, optimizer: str, traced: bool, count: int, **options: Any) -> Model:
    model = Model(case, optimizer, traced)
    held = dict(model.named_parameters())
    trainer(1, strategy, max_epochs=1, **options).fit(model, loader(count), loader(2, seed=9))
    assert dict(model.named_parameters()).keys() == held.keys()
    assert all(p is held[name] for name, p in model.named_parameters()), "the objects that came in"
    return model


def strategy(case: str, traced: bool, **options: Any) -> DSPStrategy:
    split: list[Any] = list(CASES[case].split)
    if traced:
        split = [f"blocks.{start}" for start in split]
    return DSPStrategy(stages=3, split=split, module="net", **options)


@pytest.mark.parametrize(("case", "optimizer", "traced"), WAYS)
def test_one_batch_drained_is_a_step_of_the_plain_trainer_bit_for_bit(case: str, optimizer: str, traced: bool) -> None:
    plain = fit(case, "auto", optimizer, traced, count=1)
    for recompute in (True, False):
        stale = fit(case, strategy(case, traced, staleness=(4, 2, 0), recompute=recompute), optimizer, traced, count=1)
        assert_same(weights(plain), weights(stale))
        assert plain.evaluated == stale.evaluated, "in eval mode, of the trained weights"
    before = weights(Model(case, optimizer, traced))
    moved = [not torch.equal(before[name], value) for name, value in weights(plain).items()]
    assert all(moved) or case in ("frozen", "parametrized"), "the test would see a weight that is left out"


@pytest.mark.parametrize("case", list(CASES))
def test_back_propagation_is_the_plain_trainer_bit_for_bit(case: str) -> None:
    plain = fit(case, "auto", "SGD", False, count=4, val_check_interval=2)
    stale = fit(case, strategy(case, False, staleness="bp"), "SGD", False, count=4, val_check_interval=2)
    assert_same(weights(plain), weights(stale))
    assert plain.evaluated == stale.evaluated


@pytest.mark.parametrize("case", [name for name in CASES if name != "compiled"])  # which deepcopy unwraps
def test_kept_graphs_train_as_copies_of_the_blocks_would(case: str) -> None:
    m = (4, 2, 0)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        net = CASES[case].make()
    bounds = [0, *CASES[case].split, len(net)]
    blocks: list[nn.Module] = [net[a:b] for a, b in pairwise(bounds)]
    expected = Snapshots(blocks, m)
    expected.train(rows(9))
    stages = [Stage(Block(b), m[k], recompute=False, first=k == 0, last=k == 2) for k, b in enumerate(blocks)]
    train(Pipeline(stages), rows(9))
    for k, block in enumerate(blocks):
        assert_same(weights(expected.blocks[k]), weights(block))


def train(pipeline: Pipeline, data: list[Tensor]) -> None:
    parameters = [p for stage in pipeline.stages for p in stage.block.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for x in data:
        result = pipeline.forward((x,))
        assert result is not None
        result[0].square().mean().backward()
        pipeline.backward()
        step()
    pipeline.drain(step)


def test_hooks_of_parameters_see_every_gradient() -> None:
    block = Twice()
    mask = torch.zeros_like(block.one.weight)
    block.one.weight.register_hook(lambda gradient: gradient * mask)
    before = weights(block)
    pipeline = Pipeline([Stage(Block(block), 2, recompute=False, first=True), Stage(Block(nn.Tanh()), 0, last=True)])
    train(pipeline, rows(5))
    assert torch.equal(block.one.weight, before["one.weight"])
    assert not torch.equal(block.one.bias, before["one.bias"])


def test_an_optimizer_that_steps_within_the_backward_of_a_kept_graph_is_refused() -> None:
    block = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    stage = Stage(Block(block), 1, recompute=False, first=True)
    (x,) = rows(1)
    stage.forward(0, (x,))
    with pytest.raises(RuntimeError, match=r"changed the weights .*DSPStrategy\(recompute=True\)"):
        stage.backward(0, [x])


def test_an_in_place_change_of_what_autograd_has_saved_is_still_an_error() -> None:
    """The versions of the weights are put back for a backward; those of everything else are not."""

    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.register_buffer("shift", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            self.shift += 1
            return x * self.weight * self.shift

    stage = Stage(Block(Spoils()), 1, recompute=False, first=True)
    first, second = rows(2)
    stage.forward(0, (first,))
    stage.forward(1, (second,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stage.backward(0, [first])
