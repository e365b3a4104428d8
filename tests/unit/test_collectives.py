"""Before a collective of Lightning's, all ranks meet where they can; with a control that notes what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_stale import DSPStrategy, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.failures import RunFailedError
from lightning_stale.strategies.collectives import Collectives
from lightning_stale.strategies.other_ranks import OtherRanks
from lightning_stale.strategies.present import Present
from lightning_stale.strategies.updates.averaging import AveragingUpdate
from lightning_stale.strategies.updates.local import LocalUpdate
from lightning_stale.strategies.updates.server import ServerUpdate
from lightning_stale.topology import Topology


class Control:
    """Notes; with a failure, raises it."""

    def __init__(self, noted: list[str], failure: RunFailedError | None = None) -> None:
        self.noted, self.failure = noted, failure

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        if self.failure is not None:
            raise self.failure
        self.noted.append(f"{place}, {detail}")

    def close(self, finished: bool) -> None:
        self.noted.append(f"closed, finished={finished}")


class Setup:
    """Ranks that may meet or not, and what happens around a collective."""

    def __init__(self, *, joined: bool = True, may_meet: bool = True, failure: RunFailedError | None = None) -> None:
        self.noted: list[str] = []
        trainer: Any = SimpleNamespace(global_step=4, received_sigterm=False)
        self.others = OtherRanks(lambda: trainer)
        if joined:
            self.others.join(Control(self.noted, failure))  # type: ignore[arg-type]
        self.collectives = Collectives(
            self.others, lambda: may_meet, self.undisturbed, Present(), lambda: pytest.fail("nobody can be lost")
        )

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        self.noted.append("in")
        yield
        self.noted.append("out")

    def call(self) -> int:
        self.noted.append("call")
        return 3


def test_all_meet_first() -> None:
    setup = Setup()
    assert setup.collectives.run("broadcast", setup.call) == 3
    assert setup.noted == ["in", "a collective operation (broadcast), step 4", "call", "out"]


def test_a_collective_of_some_ranks_is_none_of_all_ranks_business() -> None:
    setup = Setup()
    setup.collectives.run("reduce", setup.call, group=object())
    assert setup.noted == ["in", "call", "out"]


@pytest.mark.parametrize("options", [{"joined": False}, {"may_meet": False}])
def test_ranks_that_cannot_meet_go_on(options: dict[str, Any]) -> None:
    setup = Setup(**options)
    assert setup.collectives.run("broadcast", setup.call) == 3
    setup.collectives.barrier(setup.call)  # type: ignore[arg-type]
    assert setup.noted == 2 * ["in", "call", "out"]


def test_a_meeting_is_a_barrier() -> None:
    setup = Setup()
    setup.collectives.barrier(setup.call)  # type: ignore[arg-type]
    assert setup.noted == ["in", "a collective operation (barrier), step 4", "out"]


def test_nobody_enters_a_collective_of_a_run_that_has_failed() -> None:
    setup = Setup(failure=RunFailedError("error", "rank 1 raised ValueError"))
    with pytest.raises(RunFailedError, match="rank 1 raised ValueError"):
        setup.collectives.run("broadcast", setup.call)
    assert "call" not in setup.noted


def test_who_leaves_meets_nobody_any_more() -> None:
    setup = Setup()
    setup.others.leave(finished=True)
    setup.others.leave(finished=False)
    setup.collectives.run("broadcast", setup.call)
    setup.others.meet("validation")
    assert setup.noted == ["closed, finished=True", "in", "call", "out"]


# --- what the strategies are composed of ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "update", "topology"),
    [
        (StaleSyncStrategy, ServerUpdate, Topology(4, nodes=2)),
        (HPSGDStrategy, AveragingUpdate, Topology(4, nodes=2)),
        (DSPStrategy, LocalUpdate, Topology(4, stages=4, nodes=2)),
    ],
)
def test_a_strategy_is_a_topology_and_an_update(make: Any, update: type, topology: Topology) -> None:
    strategy = make()
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: 4, global_rank=lambda: 3)
    strategy.num_nodes = 2
    assert strategy.topology == topology
    assert type(strategy._update) is update
    assert strategy.distributed_sampler_kwargs == topology.sampler_kwargs(3)


def test_one_replica_has_nothing_to_reduce_or_gather_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reduce", "all_gather"):
        monkeypatch.setattr(DDPStrategy, name, lambda *_: pytest.fail("a collective"))
    strategy: Any = DSPStrategy()
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: 4, global_rank=lambda: 3)
    value = torch.ones(2, requires_grad=True)
    assert strategy.reduce(value) is value
    assert strategy.all_gather(value, sync_grads=True).shape == (1, 2)
    assert strategy.all_gather(value, sync_grads=True).requires_grad
    assert not strategy.all_gather(value).requires_grad, "as DDP's"


@pytest.mark.parametrize(
    ("make", "may_meet"), [(StaleSyncStrategy, False), (HPSGDStrategy, False), (DSPStrategy, True)]
)
def test_after_an_interruption_whole_replicas_go_on_by_themselves_and_parts_of_one_cannot(
    make: Any, may_meet: bool
) -> None:
    strategy = make()
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: 2, global_rank=lambda: 0)
    trainer = SimpleNamespace(interrupted=True)
    strategy._lightning_module = SimpleNamespace(trainer=trainer, _trainer=trainer)
    assert strategy._may_meet() is may_meet
    trainer.interrupted = False
    assert strategy._may_meet()
