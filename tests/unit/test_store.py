"""The store: one step per push, or one with the mean of a round; clipped as torch does; counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.transport.layout import Layout

SHAPES = [(3, 2), (4,), (2, 2)]
MakeOptimizer = Callable[[Sequence[Tensor]], Optimizer]
MAKERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.75, weight_decay=0.125),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.125),
}


def start_values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make_store(*makers: tuple[MakeOptimizer, Sequence[int]]) -> ParameterStore:
    """Return a store with :func:`start_values` and an optimizer per (how to make it, places of its parameters)."""
    values = start_values()
    layout = Layout.of(values)
    store = ParameterStore(torch.zeros(layout.nbytes, dtype=torch.uint8), layout)
    with torch.no_grad():
        for parameter, value in zip(store.parameters, values, strict=True):
            parameter.copy_(value)
    store.set_optimizers([make([store.parameters[place] for place in places]) for make, places in makers])
    return store


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def push_of(
    store: ParameterStore, seed: int, optimizer: int = 0, used: Sequence[bool] | None = None, **kwargs: Any
) -> Push:
    count = len(store.places(optimizer))
    options = kwargs.pop("options", None) or read_options(store.optimizers[optimizer])
    return Push(optimizer, used or [True] * count, gradients(seed), options, **kwargs)


class Plain:
    """torch without a store: the expected trajectory."""

    def __init__(self, make: MakeOptimizer, places: Sequence[int] = (0, 1, 2)) -> None:
        self.parameters = [torch.nn.Parameter(value) for value in start_values()]
        self.optimizer = make([self.parameters[place] for place in places])

    def step(self, values: Sequence[Tensor | None], clip: Callable[[Sequence[Tensor]], Any] | None = None) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.grad = None if value is None else value.clone()
        if clip is not None:
            clip([parameter for parameter in self.parameters if parameter.grad is not None])
        self.optimizer.step()

    def assert_equals(self, store: ParameterStore, exact: bool = True) -> None:
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(
            [parameter.detach() for parameter in store.parameters],
            [parameter.detach() for parameter in self.parameters],
            **tolerance,
        )


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> MakeOptimizer:
    return MAKERS[request.param]


def test_apply_is_one_step_per_push(make: MakeOptimizer) -> None:
    store, plain = make_store((make, [0, 1, 2])), Plain(make)
    for seed in (1, 2, 3):
        store.apply(push_of(store, seed))
        plain.step(gradients(seed))
        plain.assert_equals(store)
    assert store.version == 3


def test_weights_are_written_in_the_buffer(make: MakeOptimizer) -> None:
    store = make_store((make, [0, 1, 2]))
    before = store.weights.clone()
    store.apply(push_of(store, 1))
    assert not torch.equal(store.weights, before)
    views = Layout.of(start_values()).views(store.weights)
    assert all(torch.equal(view, parameter) for view, parameter in zip(views, store.parameters, strict=True))


def test_a_parameter_without_a_gradient_stays(make: MakeOptimizer) -> None:
    store, plain = make_store((make, [0, 1, 2])), Plain(make)
    store.apply(push_of(store, 1))
    plain.step(gradients(1))
    given = gradients(2)
    store.apply(push_of(store, 2, used=[True, False, True]))
    plain.step([given[0], None, given[2]])
    plain.assert_equals(store)
    assert torch.equal(store.parameters[1], plain.parameters[1])


def test_gradients_are_gone_after_the_step(make: MakeOptimizer) -> None:
    store = make_store((make, [0, 1, 2]))
    store.apply(push_of(store, 1))
    store.apply_mean([push_of(store, 1), push_of(store, 2)])
    assert [parameter.grad for parameter in store.parameters] == [None] * 3


def test_options_of_the_push_act() -> None:
    store = make_store((MAKERS["sgd"], [0, 1, 2]))
    plain = Plain(lambda parameters: torch.optim.SGD(parameters, lr=0.25, momentum=0.5))
    options = [{"lr": 0.25, "momentum": 0.5, "weight_decay": 0.0}]
    store.apply(push_of(store, 1, options=options))
    plain.step(gradients(1))
    plain.assert_equals(store)


def test_of_a_round_the_options_of_the_first_push_act() -> None:
    store = make_store((MAKERS["sgd"], [0, 1, 2]))
    plain = Plain(lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    mine, other = [{"lr": 0.25, "momentum": 0.0, "weight_decay": 0.0}], [{"lr": 9.0}]
    store.apply_mean([push_of(store, 1, options=mine), push_of(store, 1, options=other)])
    plain.step(gradients(1))
    plain.assert_equals(store)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_apply_mean_is_one_step_with_the_mean(make: MakeOptimizer, workers: int) -> None:
    store, plain = make_store((make, [0, 1, 2])), Plain(make)
    for first in (1, 11):
        seeds = range(first, first + workers)
        store.apply_mean([push_of(store, seed) for seed in seeds])
        plain.step([sum(given) / workers for given in zip(*map(gradients, seeds), strict=True)])
    plain.assert_equals(store)
    assert store.version == 2


def test_the_mean_is_summed_in_the_order_given() -> None:
    """Rank order, which makes BSP reproducible: floating-point sums depend on it."""
    values = [1e8, 1.0, -1e8]
    store = make_store((lambda parameters: torch.optim.SGD(parameters, lr=1.0), [0, 1, 2]))
    before = store.parameters[1].detach().clone()

    def push(value: float) -> Push:
        given = [torch.full(shape, value) for shape in SHAPES]
        return Push(0, [False, True, False], given, read_options(store.optimizers[0]))

    store.apply_mean([push(value) for value in values])
    assert torch.equal(store.parameters[1], before)  # (1e8 + 1) - 1e8 == 0
    store.apply_mean([push(value) for value in (1e8, -1e8, 1.0)])
    torch.testing.assert_close(store.parameters[1].detach(), before - 1 / 3)


def test_missing_gradients_count_as_zero_in_the_mean(make: MakeOptimizer) -> None:
    """As with DDP(find_unused_parameters=True): the divisor is the number of workers."""
    store, plain = make_store((make, [0, 1, 2])), Plain(make)
    store.apply_mean(
        [
            push_of(store, 1, used=[True, False, False]),
            push_of(store, 2, used=[True, True, False]),
            push_of(store, 3, used=[True, False, False]),
        ]
    )
    first, second, third = gradients(1), gradients(2), gradients(3)
    plain.step([(first[0] + second[0] + third[0]) / 3, second[1] / 3, None])
    plain.assert_equals(store, exact=False)
    assert torch.equal(store.parameters[2], start_values()[2])


CLIPS: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "norm": lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.5),
    "value": lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.5),
}


@pytest.mark.parametrize("algorithm", CLIPS)
@pytest.mark.parametrize("used", [[True, True, True], [True, False, True]])
def test_the_mean_is_clipped_as_torch_does(algorithm: str, used: list[bool]) -> None:
    store, plain = make_store((MAKERS["sgd"], [0, 1, 2])), Plain(MAKERS["sgd"])
    seeds = (1, 2)
    store.apply_mean([push_of(store, seed, used=used, clip=(0.5, algorithm)) for seed in seeds])
    mean = [sum(given) / 2 for given in zip(*map(gradients, seeds), strict=True)]
    plain.step([value if is_used else None for value, is_used in zip(mean, used, strict=True)], CLIPS[algorithm])
    plain.assert_equals(store)
    unclipped = Plain(MAKERS["sgd"])
    unclipped.step([value if is_used else None for value, is_used in zip(mean, used, strict=True)])
    assert not torch.equal(unclipped.parameters[0], plain.parameters[0]), "nothing was clipped: this tests nothing"


def test_several_optimizers_step_their_own_parameters() -> None:
    store = make_store((MAKERS["sgd"], [0, 1]), (MAKERS["adam"], [2]))
    sgd, adam = Plain(MAKERS["sgd"], [0, 1]), Plain(MAKERS["adam"], [2])
    assert (store.places(0), store.places(1)) == ([0, 1], [2])
    store.apply(push_of(store, 1, optimizer=1))
    adam.step([None, None, gradients(1)[2]])
    assert torch.equal(store.parameters[0], start_values()[0])
    store.apply(push_of(store, 2, optimizer=0))
    sgd.step([*gradients(2)[:2], None])
    for place, plain in enumerate((sgd, sgd, adam)):
        assert torch.equal(store.parameters[place], plain.parameters[place])
    assert store.version == 2


def test_a_round_over_several_optimizers_takes_a_step_of_each() -> None:
    store = make_store((MAKERS["sgd"], [0, 1]), (MAKERS["adam"], [2, 1]))
    sgd, adam = Plain(MAKERS["sgd"], [0]), Plain(MAKERS["adam"], [2])
    store.apply_mean(
        [
            push_of(store, 1, optimizer=1, used=[True, False]),
            push_of(store, 2, optimizer=0, used=[True, False]),
            push_of(store, 3, optimizer=1, used=[True, False]),
        ]
    )
    sgd.step([gradients(2)[0], None, None])
    adam.step([None, None, (gradients(1)[2] + gradients(3)[2]) / 2])
    assert torch.equal(store.parameters[0], sgd.parameters[0])
    assert torch.equal(store.parameters[2], adam.parameters[2])
    assert torch.equal(store.parameters[1], start_values()[1])
    assert store.version == 2


def test_places_follow_the_param_groups() -> None:
    store = make_store(
        (lambda p: torch.optim.SGD([{"params": [p[2]]}, {"params": [p[0], p[1]], "lr": 0.5}], lr=0.25), [0, 1, 2])
    )
    assert store.places(0) == [2, 0, 1]
    before = start_values()
    store.apply(push_of(store, 1, used=[True, False, True]))
    given = gradients(1)
    assert torch.equal(store.parameters[2], before[2] - 0.25 * given[2])
    assert torch.equal(store.parameters[0], before[0])
    assert torch.equal(store.parameters[1], before[1] - 0.5 * given[1])


def test_optimizer_state_is_that_of_the_state_dict() -> None:
    store, plain = make_store((MAKERS["adam"], [0, 1, 2])), Plain(MAKERS["adam"])
    assert store.optimizer_state(0) == {"state": {}, "param_groups": [{}]}
    store.apply(push_of(store, 1))
    plain.step(gradients(1))
    state = store.optimizer_state(0)["state"]
    torch.testing.assert_close(state, plain.optimizer.state_dict()["state"], rtol=0.0, atol=0.0)


class Counting(torch.optim.SGD):
    """Keeps a count of its own in its param groups, as Prodigy, D-Adaptation and some LAMBs do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_a_step_keeps_in_its_param_groups_is_the_servers() -> None:
    store = make_store((lambda p: Counting(p, lr=0.5), [0, 1, 2]))
    worker = Counting([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    for lr in (0.5, 0.25, 0.125):
        worker.param_groups[0]["lr"] = lr
        store.apply(replace(push_of(store, 1), options=[{**read_options(worker)[0], "k": 0}]))
        assert store.optimizers[0].param_groups[0]["lr"] == lr
    assert store.optimizers[0].param_groups[0]["k"] == 3
    assert store.optimizer_state(0)["param_groups"] == [{"k": 3}]


def test_a_parameter_that_cannot_learn_is_kept() -> None:
    layout = Layout.of([torch.zeros(2, dtype=torch.int64), torch.zeros(2)])
    store = ParameterStore(torch.zeros(layout.nbytes, dtype=torch.uint8), layout)
    assert [parameter.requires_grad for parameter in store.parameters] == [False, True]


@pytest.mark.parametrize("clip", [None, (0.25, "norm")])
def test_a_gradient_that_is_pushed_for_two_optimizers_means_the_same_to_both(clip: Any) -> None:
    """A parameter of both, one backward pass, and a step of each: the worker's gradient must still be there."""
    makes = [lambda parameters: torch.optim.SGD(parameters, lr=1.0)] * 2
    store = make_store((makes[0], (0, 1)), (makes[1], (1, 2)))
    rounds = [[push_of(store, seed, index, clip=clip) for seed in (1, 2)] for index in (0, 1)]
    first, second = rounds
    second = [replace(mine, gradients=earlier.gradients) for mine, earlier in zip(second, first, strict=True)]
    kept = [gradients(seed)[1] for seed in (1, 2)]
    store.apply_mean(first)
    store.apply_mean(second)
    assert all(torch.equal(push.gradients[1], gradient) for push, gradient in zip(second, kept, strict=True))
    if clip is None:
        mean = (kept[0] + kept[1]) / 2
        torch.testing.assert_close(store.parameters[1].detach(), start_values()[1] - 2 * mean)
