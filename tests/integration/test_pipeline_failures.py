"""A stage that raises, dies or hangs ends the run everywhere, with the reason, within seconds; nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stale import DSPStrategy
from tests.integration.harness import Worker, signal_test, workers
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches

LIMIT_S = 30.0
AT = 12


class Failing(torch.nn.Module):
    """Fails in the forward of one batch, on the rank that has it."""

    def __init__(self, how: str, folder: str) -> None:
        super().__init__()
        self.how, self.folder, self.calls = how, folder, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += x.requires_grad or not torch.is_grad_enabled()
        if self.calls == AT:
            signal_test(self.folder, "failing")
            if self.how == "raise":
                raise ArithmeticError("the layer is broken")
            if self.how == "exit":
                sys.exit(3)
            if self.how != "none":
                os.kill(os.getpid(), getattr(signal, self.how))
        return x


def train(rank: int, world_size: int, how: str, stage: int, folder: str, when: str) -> None:
    model = Chain(delay_s=0.002)
    names = [name for name, _ in model.net.named_children()]
    model.net[[0, 3, 6][stage]].append(Failing(how, folder))
    assert len(names) == 7
    t = trainer(world_size, DSPStrategy(staleness=(4, 2, 0), split=[3, 6]), max_epochs=1000)
    if when == "fit":
        t.fit(model, batches(50), batches(2, seed=5))
    else:
        t.validate(model, batches(50), verbose=False)


def ended(how: str, stage: int, folder: Path, when: str = "fit", kill: int | None = None) -> list[Worker]:
    """Return how the ranks have ended, all within the limit."""
    with workers(train, 3, folder, 3, how, stage, str(folder), when) as group:
        group.wait_for("failing")
        if kill is not None:
            os.kill(group.pid(2 - stage), kill)
        others = [process for rank, process in enumerate(group.processes) if rank != 2 - stage]
        deadline = time.monotonic() + LIMIT_S
        for process in others:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in others), f"still there after {LIMIT_S} s"
        if how == "SIGSTOP":
            os.kill(group.pid(2 - stage), signal.SIGKILL)
        return group.join(10.0)


@pytest.mark.parametrize(("when", "stage"), [("fit", 0), ("fit", 1), ("fit", 2), ("validate", 0), ("validate", 2)])
def test_an_error_ends_all_ranks_with_its_traceback(stage: int, when: str, tmp_path: Path) -> None:
    ranks = ended("raise", stage, tmp_path, when)
    assert all(rank.exitcode != 0 for rank in ranks)
    for rank in ranks:
        assert "ArithmeticError: the layer is broken" in rank.error, f"rank {rank.rank}: {rank.error}"
        if rank.rank != 2 - stage:
            assert f"rank {2 - stage} raised ArithmeticError" in rank.error


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_stage_ends_the_others_with_an_error(stage: int, tmp_path: Path) -> None:
    ranks = ended("SIGKILL", stage, tmp_path)
    for rank in ranks:
        assert rank.exitcode != 0
        if rank.rank != 2 - stage:
            assert "RunFailedError" in rank.error or "ChannelError" in rank.error, rank.error
            assert any(word in rank.error for word in ("was killed", "has ended", "cannot be sent to")), rank.error


@pytest.mark.parametrize("stage", [0, 2])
def test_a_hanging_stage_ends_the_others_with_an_error(stage: int, tmp_path: Path) -> None:
    ranks = ended("SIGSTOP", stage, tmp_path)
    for rank in ranks:
        if rank.rank != 2 - stage:
            assert rank.exitcode != 0
            assert f"RunFailedError: rank {2 - stage} (process " in rank.error, rank.error
            assert "is gone" in rank.error, rank.error


def meet(rank: int, world_size: int, how: str, folder: str) -> None:
    """One rank stops where the others wait for it in a collective: the metrics of an epoch."""

    class Stopping(Chain):
        def on_validation_epoch_end(self) -> None:
            if rank == 1:
                signal_test(folder, "failing")
                os.kill(os.getpid(), getattr(signal, how))

    t = trainer(world_size, DSPStrategy(staleness=(4, 2, 0), split=[3, 6]), max_epochs=3)
    t.fit(Stopping(), batches(10), batches(2, seed=5))


def test_a_stage_that_never_comes_to_a_collective_ends_the_others(tmp_path: Path) -> None:
    with workers(meet, 3, tmp_path, 3, "SIGSTOP", str(tmp_path)) as group:
        group.wait_for("failing")
        deadline = time.monotonic() + LIMIT_S
        others = [group.processes[rank] for rank in (0, 2)]
        for process in others:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in others), f"still there after {LIMIT_S} s"
        os.kill(group.pid(1), signal.SIGKILL)
        for worker in group.join(10.0):
            if worker.rank != 1:
                assert worker.exitcode != 0
                assert "RunFailedError: rank 1 (process " in worker.error, worker.error
                assert "is gone" in worker.error, worker.error


def interrupted(rank: int, world_size: int, folder: str, when: str) -> Any:
    model = Chain(delay_s=0.002)
    if rank == 1:
        model.net[3].append(Failing("none", folder))
    t = trainer(world_size, DSPStrategy(staleness=(4, 2, 0), split=[3, 6]), max_epochs=1000)
    if when == "fit":
        t.fit(model, batches(50))
    else:
        t.validate(model, batches(10_000), verbose=False)
    return t.state.status.value


@pytest.mark.parametrize(
    ("number", "rank", "when"),
    [
        (signal.SIGTERM, 0, "fit"),
        (signal.SIGTERM, 1, "fit"),
        (signal.SIGINT, 1, "fit"),
        (signal.SIGTERM, 1, "validate"),
    ],
)
def test_a_signal_to_one_rank_ends_all(number: signal.Signals, rank: int, when: str, tmp_path: Path) -> None:
    with workers(interrupted, 3, tmp_path, 3, str(tmp_path), when) as group:
        group.wait_for("failing")
        os.kill(group.pid(rank), number)
        ranks = group.join(LIMIT_S)
    for worker in ranks:
        assert worker.exitcode != 0, "the run is not finished, and no exit code says that it is"
        if worker.rank != rank:
            assert (
                f"rank {rank} " + ("received SIGTERM" if number == signal.SIGTERM else "was interrupted")
                in worker.error
            )
