"""The rounds of HPSGD, without a process: against a reference, and with ranks that are interleaved at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stale.averaging.merge import MERGES
from lightning_stale.averaging.rounds import Interval, Rounds
from lightning_stale.events import Event
from lightning_stale.events.averaging import AveragingCounts
from tests.unit.averaging import reference
from tests.unit.averaging.simulation import SimulatedReducer, Simulation

SHAPES = [(4, 3), (4,), (2, 4), (2,)]
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
}


class Replica:
    """A small network, an optimizer, and batches that differ from rank to rank and from step to step."""

    def __init__(self, rank: int, optimizer: str = "SGD", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rank = rank
        self.parameters: list[Tensor] = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[place % len(dtypes)]))
            for place, shape in enumerate(SHAPES)
        ]
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.rank + number)
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        w1, b1, w2, b2 = (p.double() for p in self.parameters)
        loss = ((torch.tanh(x @ w1.T + b1) @ w2.T + b2 - y) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def make_rounds(
    parameters: list[Tensor],
    reducer: SimulatedReducer,
    size: int,
    interval: Interval,
    merge: str,
    outer: Any = None,
    record: Callable[[Event], None] = lambda event: None,
) -> Rounds:
    return Rounds(parameters, reducer, size, interval, MERGES[merge], outer, record)


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def assert_close(left: list[Tensor], right: list[Tensor], atol: float = 1e-6) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0.0)


def launches(simulation: Simulation) -> int:
    """Return how many sums each rank has launched: all equally many."""
    (number,) = set(simulation.launched)
    return number


# --- a fixed interval: the reference ----------------------------------------------------------------------------------


def train_fixed(
    size: int,
    interval: int,
    steps: int,
    merge: str,
    make: Callable[[int], Replica],
    outer: Any = None,
    flushes: tuple[int, ...] = (),
) -> list[list[Tensor]]:
    """Return the flushed weights of each rank; ranks are interleaved at random."""

    def program(rank: int, reducer: SimulatedReducer) -> list[Tensor]:
        replica = make(rank)
        counts = AveragingCounts()
        rounds = make_rounds(replica.parameters, reducer, size, interval, merge, outer, counts.note)
        for number in range(steps):
            replica.step(number)
            rounds.after_step()
            if number + 1 in flushes:
                rounds.flush()
        rounds.flush()
        assert counts.steps == steps
        return copies(replica.parameters)

    simulation = Simulation(size, seed=steps)
    results = simulation.run(program)
    launches(simulation)
    return results


def refer(
    size: int,
    interval: int,
    steps: int,
    merge: str,
    make: Callable[[int], Replica],
    outer: reference.Outer = reference.subtract,
    flushes: tuple[int, ...] = (),
) -> list[Tensor]:
    replicas = [make(rank) for rank in range(size)]
    parameters = [replica.parameters for replica in replicas]
    return reference.hpsgd(parameters, lambda r, n: replicas[r].step(n), steps, interval, merge, outer, flushes)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("size", [2, 4])
def test_flushed_weights_equal_the_reference(size: int, interval: int, optimizer: str, merge: str) -> None:
    for steps in (1, 13, 17):
        arguments = (size, interval, steps, merge, lambda rank: Replica(rank, optimizer))
        expected = refer(*arguments)
        for weights in train_fixed(*arguments):
            assert_close(weights, expected)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_a_flush_in_between_begins_anew(interval: int, merge: str) -> None:
    arguments = (2, interval, 17, merge, lambda rank: Replica(rank, "momentum"))
    expected = refer(*arguments, flushes=(4, 11))
    assert not torch.allclose(refer(*arguments)[0], expected[0], atol=1e-5)
    for weights in train_fixed(*arguments, flushes=(4, 11)):
        assert_close(weights, expected)


@pytest.mark.parametrize("merge", MERGES)
def test_several_types_of_parameters(merge: str) -> None:
    arguments = (2, 2, 13, merge, lambda rank: Replica(rank, "Adam", (torch.float32, torch.float64)))
    expected = refer(*arguments)
    assert [p.dtype for p in expected] == [torch.float32, torch.float64] * 2
    for weights in train_fixed(*arguments):
        assert_close(weights, expected)


@pytest.mark.parametrize("interval", [1, 3, "auto"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_rank_with_cocod_is_plain_training(optimizer: str, interval: Interval) -> None:
    plain = Replica(0, optimizer)
    for number in range(13):
        plain.step(number)
    (weights,) = train_fixed(1, interval, 13, "cocod", lambda rank: Replica(rank, optimizer), flushes=(4, 5))
    assert_close(weights, copies(plain.parameters))


def test_one_rank_with_hpsgd_is_one_round_late() -> None:
    """H = 1 from 0 with gradient 1, lr 1: D0 = 1 is on its way while x = -1 trains on; W1 = -1 takes step 2 back."""
    weight = nn.Parameter(torch.zeros(1))
    seen = []

    def program(_: int, reducer: SimulatedReducer) -> None:
        rounds = make_rounds([weight], reducer, 1, 1, "hpsgd")
        for _step in range(4):
            weight.data.sub_(1.0)
            rounds.after_step()
            seen.append(weight.item())
        rounds.flush()
        seen.append(weight.item())

    Simulation(1, seed=0).run(program)
    assert seen == [-1.0, -1.0, -2.0, -3.0, -4.0]


# --- the outer optimizer ----------------------------------------------------------------------------------------------


def nesterov(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_outer_optimizer_gets_the_mean_change_as_gradient(interval: int, merge: str) -> None:
    for flushes in ((), (4, 8)):  # also where nothing is left to send
        arguments = (2, interval, 16, merge, lambda rank: Replica(rank, "momentum"))
        expected = refer(*arguments, outer=reference.nesterov(0.7, 0.9), flushes=flushes)
        for weights in train_fixed(*arguments, outer=nesterov, flushes=flushes):
            assert_close(weights, expected)


def test_a_flush_after_a_flush_changes_nothing() -> None:
    """Validation, a checkpoint and the end of the epoch follow each other: momentum alone must not move the weights."""

    def program(rank: int, reducer: SimulatedReducer) -> list[list[Tensor]]:
        replica, flushed = Replica(rank), []
        rounds = make_rounds(replica.parameters, reducer, 2, 2, "hpsgd", nesterov)
        for number in range(5):
            replica.step(number)
            rounds.after_step()
        for _ in range(3):
            rounds.flush()
            flushed.append(copies(replica.parameters))
        return flushed

    for first, *others in Simulation(2, seed=1).run(program):
        for other in others:
            assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_outer_optimizer_has_the_parameters_in_the_models_order() -> None:
    dtypes = [torch.float64, torch.float32, torch.float64, torch.float32]
    parameters: list[Tensor] = [nn.Parameter(torch.full((n + 1,), n, dtype=t)) for n, t in enumerate(dtypes)]

    def program(_: int, reducer: SimulatedReducer) -> Rounds:
        return make_rounds(parameters, reducer, 1, "auto", "hpsgd", nesterov)

    (rounds,) = Simulation(1, seed=0).run(program)
    held = rounds.outer.param_groups[0]["params"]
    assert [(tuple(p.shape), p.dtype) for p in held] == [((n + 1,), t) for n, t in enumerate(dtypes)]
    assert all(torch.equal(p, own) for p, own in zip(held, parameters, strict=True))
    assert all(p.data_ptr() != own.data_ptr() for p, own in zip(held, parameters, strict=True))


# --- every local change reaches the global weights exactly once -------------------------------------------------------

LR = 2.0**-10


def count_changes(
    size: int, interval: Interval, merge: str, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Simulation, list[list[int]], list[list[Tensor]]]:
    """Each rank takes random numbers of steps of ``-LR`` in its own page, and flushes after each.

    Returns:
        The simulation, the steps (rank, segment), and the weights after each flush (rank, segment).
    """
    draw = random.Random(seed)
    steps = [[draw.randrange(0, 12) for _ in range(3)] for _ in range(size)]
    simulation = Simulation(size, seed, speeds=[draw.choice([0.05, 0.3, 1.0]) for _ in range(size)])

    def program(rank: int, reducer: SimulatedReducer) -> list[Tensor]:
        parameters: list[Tensor] = [nn.Parameter(torch.zeros(size, dtype=dtype)), nn.Parameter(torch.zeros(3, 2))]
        rounds = make_rounds(parameters, reducer, size, interval, merge)
        flushed = []
        for segment in steps[rank]:
            for _ in range(segment):
                simulation.pause(rank)
                parameters[0].data[rank] -= LR
                parameters[1].data -= LR
                rounds.after_step()
            rounds.flush()
            flushed.append(torch.cat([p.detach().clone().reshape(-1) for p in parameters]))
        return flushed

    return simulation, steps, simulation.run(program)


def check_counts(size: int, steps: list[list[int]], flushed: list[list[Tensor]]) -> None:
    for segment in range(3):
        counted = torch.tensor([sum(own[: segment + 1]) for own in steps], dtype=torch.float32)
        expected = torch.cat([counted, counted.sum().expand(6)]) * -LR / size
        for rank in range(size):
            assert torch.equal(flushed[rank][segment], expected)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("interval", ["auto", 1, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_every_change_is_applied_exactly_once(size: int, interval: Interval, merge: str) -> None:
    for seed in range(30):
        simulation, steps, flushed = count_changes(size, interval, merge, seed)
        check_counts(size, steps, flushed)
        launches(simulation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_change_is_applied_exactly_once_in_other_types(dtype: torch.dtype) -> None:
    for seed in range(10):
        _, steps, flushed = count_changes(2, "auto", "hpsgd", seed, dtype)
        check_counts(2, steps, [[weights.float() for weights in own] for own in flushed])


def test_ranks_that_come_to_the_flush_in_different_rounds_finish_it_together() -> None:
    """200 seeds; a rank that waits for ever, or launches a sum that the others do not, fails in the simulation."""
    sums, rounds_apart = set(), 0
    for seed in range(200):
        draw = random.Random(seed)
        size, interval = draw.choice([2, 3, 4]), draw.choice(["auto", "auto", 1, 2])
        steps = [draw.randrange(0, 25) for _ in range(size)]
        simulation = Simulation(size, seed, speeds=[draw.choice([0.02, 0.2, 1.0]) for _ in range(size)])
        at_flush = [0] * size

        def program(rank: int, reducer: SimulatedReducer) -> Tensor:
            weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            rounds = make_rounds([weight], reducer, size, interval, "hpsgd")  # noqa: B023 - run before the next turn
            for _ in range(steps[rank]):  # noqa: B023
                simulation.pause(rank)  # noqa: B023
                weight.data -= 1.0
                rounds.after_step()
            at_flush[rank] = simulation.launched[rank]  # noqa: B023
            rounds.flush()
            return weight.detach().clone()

        results = simulation.run(program)
        sums.add(launches(simulation))
        rounds_apart += len(set(at_flush)) > 1
        for weight in results:
            torch.testing.assert_close(weight, torch.full_like(weight, -sum(steps) / size))
            assert torch.equal(weight, results[0])
    assert rounds_apart > 100  # what this test is about did happen
    assert len(sums) > 5


# --- what is counted --------------------------------------------------------------------------------------------------


def test_counts() -> None:
    def program(rank: int, reducer: SimulatedReducer) -> Any:
        replica = Replica(rank)
        counts = AveragingCounts()
        rounds = make_rounds(replica.parameters, reducer, 2, 2, "hpsgd", record=counts.note)
        for number in range(5):
            replica.step(number)
            rounds.after_step()
        before = counts.rounds
        rounds.flush()
        return before, counts

    for before, after in Simulation(2, seed=2).run(program):
        assert before == 1  # two sums launched after steps 2 and 4, the first has arrived
        assert after.steps == 5
        assert after.rounds == 3  # and the second, and what was left
        assert 0 <= after.wait_s <= after.exchange_s
