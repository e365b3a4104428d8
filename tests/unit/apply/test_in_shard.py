"""Apply rules behind the server's messages: over shared memory and as chunks, alone, resumed, and amid a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_stale import ASP, SSP, ApplyRule, Dana, Ringmaster, StalePush, Step
from tests.unit.apply.cases import CASES, tensors, vector
from tests.unit.apply.reference import LR, ORDER, START, WORKERS, Trajectory, gradient, mask, play, used
from tests.unit.test_shard import SHARED, Harness


class Workers:
    """Fake workers that compute their gradients at the weights that the server's messages have given them."""

    def __init__(self, harness: Harness, shared: bool) -> None:
        self.harness = harness
        harness.start(shared)
        self.held = [vector(harness.store.parameters) for _ in range(harness.world_size)]
        self.seen = Trajectory()

    def push(self, turn: int, worker: int) -> dict[str, Any]:
        given = gradient(self.held[worker], worker)
        self.harness.push(worker, tensors(given), used=used(turn))
        message = self.harness.released(worker)
        if message["nbytes"] or worker in self.harness.segments:
            self.held[worker] = vector(self.harness.weights(worker, message))
        self.seen.weights.append(self.held[worker])
        self.seen.staleness.append(message["staleness"])
        self.seen.applied.append(message["applied"])
        assert message["version"] == self.harness.store.version == self.seen.versions[-1]
        return message


def harness_of(rule: ApplyRule, world_size: int = WORKERS, folder: str = "", paradigm: Any = None) -> Harness:
    return Harness(
        paradigm or ASP(),
        world_size,
        folder,
        lambda p: [torch.optim.SGD(p, lr=LR)],
        rule,
        tensors(START),
    )


def assert_like(seen: Trajectory, expected: Trajectory) -> None:
    assert (seen.applied, seen.staleness) == (expected.applied, expected.staleness)
    np.testing.assert_allclose(seen.weights, expected.weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_what_the_paper_says(name: str, shared: bool, tmp_path: Path) -> None:
    make, reference = CASES[name]
    workers = Workers(harness_of(make(), folder=str(tmp_path)), shared)
    for turn, worker in enumerate(ORDER):
        workers.push(turn, worker)
    expected = play(reference())
    assert_like(workers.seen, expected)
    summary = workers.harness.ask(0, "summary")
    assert summary["updates"] == sum(expected.applied)
    for rank, row in enumerate(summary["workers"]):
        mine = [turn for turn, worker in enumerate(ORDER) if worker == rank]
        assert row["pushes"] == len(mine)
        assert row["refused"] == sum(not expected.applied[turn] for turn in mine)
        assert row["max_staleness"] == max(expected.staleness[turn] for turn in mine)
    assert dict(workers.harness.paradigm.clocks) == {rank: ORDER.count(rank) for rank in range(WORKERS)}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_goes_on_from_a_snapshot(name: str, shared: bool, tmp_path: Path) -> None:
    """The workers of the new run all start with the newest weights."""
    make, reference = CASES[name]
    first = Workers(harness_of(make(), folder=str(tmp_path)), shared)
    for turn, worker in enumerate(ORDER[:14]):
        first.push(turn, worker)
    saved = copy.deepcopy(first.harness.ask(0, "snapshot"))
    harness = harness_of(make(), folder=str(tmp_path))
    harness.store.set_weights([0, 1], first.harness.store.views)
    harness.shard.resume(saved)
    assert harness.store.version == first.harness.store.version
    second = Workers(harness, shared)
    second.seen.applied = list(first.seen.applied)
    for turn, worker in enumerate(ORDER[14:], start=14):
        second.push(turn, worker)
    assert_resumed_like(second.seen, reference(), stop=14)


def assert_resumed_like(seen: Trajectory, master: Any, stop: int) -> None:
    """As ``play``, but all workers pull at ``stop``."""
    now, version, held, pulled = START.copy(), 0, [START.copy()] * WORKERS, [0] * WORKERS
    for turn, worker in enumerate(ORDER):
        if turn == stop:
            held, pulled = [now.copy()] * WORKERS, [version] * WORKERS
        g = gradient(held[worker], worker) * mask(turn)
        new = master(now, held[worker], g, version - pulled[worker], worker, mask(turn))
        assert (new is not None) == seen.applied[turn]
        if new is not None:
            now, version = new, version + 1
        held[worker], pulled[worker] = now.copy(), version
        if turn >= stop:
            np.testing.assert_allclose(seen.weights[turn - stop], now, rtol=1e-12, atol=1e-12)


def test_a_snapshot_of_before_there_were_rules_loads() -> None:
    harness = harness_of(Dana())
    harness.start()
    saved = harness.ask(0, "snapshot")
    del saved["apply"]
    for worker in saved["workers"]:
        del worker["refused"]
    harness_of(Dana()).shard.resume(saved)


# --- what is let go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
def test_the_gate_counts_what_is_let_go(shared: bool, tmp_path: Path) -> None:
    harness = harness_of(Ringmaster(R=1), 2, str(tmp_path), SSP(0))
    harness.start(shared)
    harness.push(0)
    assert harness.take(0) == []
    harness.push(1)
    for rank, staleness in ((0, 0), (1, 1)):
        message = harness.released(rank)
        assert (message["version"], message["clock"], message["lead"]) == (1, 1, 0)
        assert (message["staleness"], message["applied"]) == (staleness, rank == 0)
        np.testing.assert_array_equal(vector(harness.weights(rank, message)), START - LR)


@pytest.mark.parametrize("shared", SHARED)
def test_what_is_let_go_amid_a_step_changes_nothing(shared: bool, tmp_path: Path) -> None:
    """In manual optimization a worker pulls only what its push has changed, and the rest after the batch."""
    harness = harness_of(Ringmaster(R=2), 2, str(tmp_path))
    harness.start(shared)
    for _ in range(2):
        harness.push(1)
        harness.take(1)
    for _ in range(2):
        harness.push(0, whole=False)
        message = harness.released(0)
        assert (message["applied"], message["staleness"], message["nbytes"]) == (False, 2, 0)
        if shared:
            np.testing.assert_array_equal(vector(harness.weights(0, message)), START)
    harness.send(0, "pull")
    (message,) = harness.take(0)
    np.testing.assert_allclose(vector(harness.weights(0, message)), START - 2 * LR)
    harness.push(0, whole=False)
    assert harness.released(0)["applied"]


# --- the weights of then ----------------------------------------------------------------------------------------------


class Spy(ApplyRule):
    """Plain; notes the weights of then."""

    needs_weights_then = True

    def __init__(self) -> None:
        self.then: list[Any] = []

    def step(self, push: StalePush) -> Step:
        self.then.append(
            (push.worker, [(place, then.clone()) for place, then in zip(push.places, push.weights_then, strict=True)])
        )
        return Step(push.gradients)


@pytest.mark.parametrize("shared", SHARED)
def test_the_weights_of_then_are_those_that_the_worker_holds(shared: bool, tmp_path: Path) -> None:
    """Also amid a step, where it holds its own changes only, and after a pull without a push."""
    spy = Spy()
    harness = harness_of(spy, 2, str(tmp_path))
    workers = Workers(harness, shared)
    held: list[list[Tensor]] = [tensors(START) for _ in range(2)]
    generator = np.random.default_rng(3)
    for _ in range(60):
        rank = int(generator.integers(2))
        if generator.random() < 0.25:
            harness.send(rank, "pull")
            harness.take(rank)
            held[rank] = [view.clone() for view in harness.store.views]
            continue
        whole, both = bool(generator.integers(2)), bool(generator.integers(2))
        harness.push(rank, tensors(generator.normal(size=7)), used=[True, both], whole=whole)
        harness.take(rank)
        worker, then = spy.then[-1]
        assert worker == rank
        assert [place for place, _ in then] == ([0, 1] if both else [0])
        for place, value in then:
            assert torch.equal(value, held[rank][place]), "not what the worker computed with"
        for place in (0, 1) if whole or both else (0,):
            held[rank][place] = harness.store.views[place].clone()
    assert workers.harness.store.version == len(spy.then) > 30


@pytest.mark.parametrize("shared", SHARED)
def test_alone_the_weights_of_then_are_those_of_now(shared: bool, tmp_path: Path) -> None:
    """Also where the worker has changed them itself."""
    spy = Spy()
    harness = harness_of(spy, 1, str(tmp_path))
    harness.start(shared)
    harness.push(0)
    harness.take(0)
    changed = torch.full((3,), 7.0, dtype=torch.float64)
    if shared:
        harness.layout.views(harness.segments[0][harness.layout.nbytes :])[0].copy_(changed)
    else:
        harness.send(0, "change", places=[0], nbytes=changed.numel() * 8)
        harness.send(0, "chunk", offset=0, payload=changed.numpy().tobytes())
    harness.push(0)
    assert torch.equal(spy.then[1][1][0][1], changed)


def test_a_copy_of_the_weights_is_kept_for_rules_that_need_it() -> None:
    for rule, kept in ((Spy(), True), (Dana(), False)):
        harness = harness_of(rule, 2)
        harness.start()
        assert all((worker.link.weights is not None) is kept for worker in harness.shard._workers.values())
