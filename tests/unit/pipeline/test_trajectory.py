"""The weights equal those of an independent reference, and with staleness 0 those of the plain Trainer, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stale import DSPStrategy
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.networks import Chain, batches
from tests.unit.pipeline.reference import Reference, distance, of_chain

SGD = ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3})
ADAM = ("Adam", {"lr": 0.01})
STEPS = 50


def segments(lengths: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the batches between the drains."""
    every = iter(batches(sum(lengths)))
    return [[tuple(next(every)) for _ in range(length)] for length in lengths]  # type: ignore[misc]


def random_cases(count: int) -> list[Any]:
    draw = random.Random(20)
    cases = []
    for _ in range(count):
        lags = [draw.randint(0, 4) for _ in range(draw.randint(1, 5))]
        m = tuple(sum(lags[k:]) for k in range(len(lags) + 1))
        starts = sorted(draw.sample(range(1, 7), len(lags)))
        cases.append(pytest.param(m, starts, draw.choice([SGD, ADAM]), draw.random() < 0.5, id=f"random-{m}"))
    return cases


@pytest.mark.parametrize(
    ("m", "starts", "optimizer", "recompute"),
    [
        *(
            pytest.param(m, starts, optimizer, recompute, id=f"{m}-{optimizer[0]}-{recompute}")
            for m, starts in (((4, 2, 0), [2, 5]), ((2, 1, 0), [3, 4]), ((6, 4, 2, 0), [1, 3, 6]))
            for optimizer in (SGD, ADAM)
            for recompute in (True, False)
        ),
        *random_cases(8),
        pytest.param((60, 0), [3], SGD, True, id="more staleness than batches"),
    ],
)
def test_the_weights_equal_the_reference(
    m: tuple[int, ...], starts: list[int], optimizer: Any, recompute: bool
) -> None:
    name, options = optimizer
    model = Chain(name, **options)
    expected = of_chain(model, starts, m, recompute=recompute)
    one_epoch, validated = segments([STEPS]), segments([17, 17, 16])
    for batch in one_epoch:
        expected.train(batch)
    strategy = DSPStrategy(stages=len(m), staleness=m, recompute=recompute, split=starts)
    trainer(1, strategy, max_epochs=1).fit(model, batches(STEPS))
    assert distance(model, expected) < 1e-6

    model = Chain(name, **options)
    expected = of_chain(model, starts, m, recompute=recompute)
    for batch in validated:
        expected.train(batch)
    strategy = DSPStrategy(stages=len(m), staleness=m, recompute=recompute, split=starts)
    t = trainer(1, strategy, max_epochs=1, val_check_interval=17, limit_val_batches=2)
    t.fit(model, batches(STEPS), batches(2, seed=5))
    assert distance(model, expected) < 1e-6


def test_the_reference_tells_staleness_recompute_and_draining_apart() -> None:
    """Or else the test above could not fail."""
    trajectories: dict[str, Reference] = {}
    for name, m, recompute, lengths in (
        ("plain", (0, 0, 0), True, [STEPS]),
        ("stale", (4, 2, 0), True, [STEPS]),
        ("less stale", (2, 1, 0), True, [STEPS]),
        ("kept graphs", (4, 2, 0), False, [STEPS]),
        ("drained", (4, 2, 0), True, [17, 17, 16]),
    ):
        trajectories[name] = of_chain(Chain(*SGD[:1], **SGD[1]), [2, 5], m, recompute=recompute)
        for batch in segments(lengths):
            trajectories[name].train(batch)
    results = list(trajectories.values())
    for i, left in enumerate(results):
        for right in results[:i]:
            pairs = zip(left.weights(), right.weights(), strict=True)
            assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-4


def test_the_reference_without_staleness_is_back_propagation() -> None:
    model = Chain(*SGD[:1], **SGD[1])
    expected = of_chain(model, [2, 5], (0, 0, 0))
    expected.train(segments([STEPS])[0])
    trainer(1, "auto", max_epochs=1).fit(model, batches(STEPS))
    assert distance(model, expected) < 1e-6


def test_gradients_accumulate_per_stage_and_every_batch_counts_once() -> None:
    """With constant gradients the weights count the batches, whatever was left over when the pipeline drained."""

    class Counting(Chain):
        def __init__(self) -> None:
            super().__init__(lr=1.0)
            self.net = torch.nn.Sequential(*(Added() for _ in range(3)))

        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return output.sum() / len(output)

    model = Counting()
    strategy = DSPStrategy(stages=3, staleness=(3, 1, 0), split=[1, 2])
    trainer(1, strategy, max_epochs=2, accumulate_grad_batches=2, val_check_interval=5, limit_val_batches=1).fit(
        model, batches(9), batches(1)
    )
    assert [layer.weight.item() for layer in model.net] == [-9.0] * 3, "18 batches of half a gradient"


class Added(torch.nn.Module):
    """Its gradient is that of the sum of its result, whatever its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] + self.weight, x[:, 1:]], 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 3}, id="accumulate"),
        pytest.param({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, id="clip"),
    ],
)
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("recompute", [True, False])
def test_back_propagation_equals_the_plain_trainer_bit_for_bit(
    optimizer: Any, options: dict[str, Any], recompute: bool
) -> None:
    def fit(strategy: Any) -> tuple[dict[str, Tensor], list[float]]:
        model = Chain(optimizer[0], schedulers=True, **optimizer[1])
        t = trainer(1, strategy, max_epochs=2, val_check_interval=11, **options)
        t.fit(model, batches(25), batches(2, seed=5))
        rates = [group["lr"] for group in t.optimizers[0].param_groups]
        return weights(model), [*rates, *map(float, t.callback_metrics.values())]

    plain, measured = fit("auto")
    stale, also = fit(DSPStrategy(stages=3, staleness="bp", recompute=recompute))
    assert_same(plain, stale)
    assert measured == also
    assert not torch.equal(plain["scale"], torch.ones(())), "it has trained"


def test_clipping_by_norm_is_per_block() -> None:
    def clip(gradients: list[Tensor]) -> None:
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((0.01 / (norm + 1e-6)).clamp(max=1.0))

    model = Chain()
    expected = of_chain(model, [2, 5], (4, 2, 0), clip=clip)
    expected.train(segments([STEPS])[0])
    strategy = DSPStrategy(staleness=(4, 2, 0), split=[2, 5])
    trainer(1, strategy, max_epochs=1, gradient_clip_val=0.01).fit(model, batches(STEPS))
    assert distance(model, expected) < 1e-6
