"""Lightning's own launchers and torchrun, on one node and on two: always the same weights."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor

from lightning_stale import DSSP, StaleSyncStrategy
from lightning_stale.transport.secret import SecretError
from tests.integration.harness import PLAIN, free_port, run_script, run_workers, script
from tests.integration.models import Regression, assert_same, loader, trainer, weights

STEPS = 20

SCRIPT = """
import sys

import torch
from lightning_stale import StaleSyncStrategy
from tests.integration.test_launchers import fit

nodes, *names = sys.argv[1:]
results = [fit(name, devices=2 // int(nodes), num_nodes=int(nodes)) for name in names]
torch.save(results, f"rank-{torch.distributed.get_rank()}.pt")
"""
"""No ``__main__`` guard: popen's children and torchrun's workers run all of it."""

SPAWN_SCRIPT = """
import torch
from lightning_stale import SSP, StaleSyncStrategy
from tests.integration.models import Regression, loader, trainer, weights
from tests.integration.test_launchers import STEPS, Raising

if __name__ == "__main__":
    strategy = StaleSyncStrategy(paradigm="bsp", start_method="spawn")
    model = Regression(momentum=0.9, lr=0.05)
    t = trainer(2, strategy, max_steps=STEPS)
    t.fit(model, loader())
    torch.save((weights(model), t.strategy.summary(), dict(t.callback_metrics)), "main.pt")
    t = trainer(2, StaleSyncStrategy(paradigm=SSP(threshold=1), start_method="fork"), max_steps=STEPS)
    t.fit(Raising(), loader())
"""


class Second(LightningEnvironment):
    """Of two hosts, without a first one to wait for."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return 2


class Raising(Regression):
    """Fails on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 2:
            raise ValueError("a fault of rank 1")
        return self.loss(batch)


def fit(name: str, devices: int, num_nodes: int = 1) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Train with the strategy ``name``, or ``transport:paradigm``; return the weights and the summary."""
    transport, _, paradigm = name.rpartition(":")
    strategy = StaleSyncStrategy(paradigm=paradigm, transport=transport) if transport else name
    model = Regression(momentum=0.9, lr=0.05)
    t = trainer(devices, strategy, num_nodes=num_nodes, max_steps=STEPS)
    t.fit(model, loader())
    return weights(model), t.strategy.summary() if isinstance(t.strategy, StaleSyncStrategy) else None


def fit_as_worker(rank: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    return fit(name, devices=2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after ``STEPS`` steps of BSP through shared memory."""
    return run_workers(fit_as_worker, 2, tmp_path_factory.mktemp("expected"), "shm:bsp")[0][0]


def assert_summary(summary: Any, paradigm: str, updates: int) -> None:
    assert summary["paradigm"] == paradigm
    assert summary["updates"] == updates
    assert [(worker["rank"], worker["pushes"]) for worker in summary["workers"]] == [(0, STEPS), (1, STEPS)]


def test_popen_and_several_trainers_in_one_script(expected: dict[str, Tensor], tmp_path: Path) -> None:
    names = ("bsp", "ssp", "ddp", "tcp:dssp", "asp", "bsp")
    ended = run_script(SCRIPT, tmp_path, "1", *names, env=PLAIN)  # a process for each rank and server
    assert ended.returncode == 0, ended.output
    results = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    for name, (left, left_summary), (right, right_summary) in zip(names, *results, strict=True):
        assert_same(left, right)
        assert left_summary == right_summary
        if name == "ddp":
            assert_same(left, expected, atol=1e-6)
        elif name == "bsp":
            assert_same(left, expected)
            assert_summary(left_summary, "BSP()", updates=STEPS)
        elif name == "asp":  # whoever is free takes the next batch
            assert left_summary is not None
            assert (left_summary["paradigm"], left_summary["updates"]) == ("ASP()", 2 * STEPS)
            assert sum(worker["pushes"] for worker in left_summary["workers"]) == 2 * STEPS
        else:
            assert left_summary is not None
            assert_summary(left_summary, left_summary["paradigm"], updates=2 * STEPS)
            assert not torch.equal(left["net.0.weight"], expected["net.0.weight"])  # 2 * STEPS steps, not their mean


def test_spawn_and_fork(expected: dict[str, Tensor], tmp_path: Path) -> None:
    """With spawn, weights, metrics and summary come back to the main process; with fork, a worker's traceback does."""
    ended = run_script(SPAWN_SCRIPT, tmp_path)
    main_weights, summary, metrics = torch.load(tmp_path / "main.pt")
    assert_same(main_weights, expected)
    assert_summary(summary, "BSP()", updates=STEPS)
    assert "train_loss" in metrics
    assert ended.returncode == 1, ended.output
    assert "ProcessRaisedException" in ended.output
    assert "ValueError: a fault of rank 1" in ended.output


def test_the_strategy_can_be_pickled() -> None:
    strategy = StaleSyncStrategy(paradigm=DSSP(lower=1, upper=4), transport="tcp", start_method="spawn")
    assert repr(pickle.loads(pickle.dumps(strategy))) == repr(strategy)


def torchrun(nodes: int, node: int, workers: int, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}"),
        *(f"--nproc-per-node={workers}", "--master-addr=127.0.0.1", f"--master-port={port}"),
    ]


def test_torchrun(expected: dict[str, Tensor], tmp_path: Path) -> None:
    ended = run_script(SCRIPT, tmp_path, "1", "bsp", command=torchrun(1, 0, 2, free_port()))
    assert ended.returncode == 0, ended.output
    for rank in (0, 1):
        ((weights_, summary),) = torch.load(tmp_path / f"rank-{rank}.pt")
        assert_same(weights_, expected)
        assert_summary(summary, "BSP()", updates=STEPS)


def test_two_nodes_without_a_secret_are_told_what_to_export() -> None:
    with pytest.raises(SecretError, match=r"export LIGHTNING_STALE_SECRET=\$\(openssl rand -hex 32\)"):
        trainer(1, "bsp", num_nodes=2, plugins=[Second()]).fit(Regression(), loader())


def test_two_nodes_over_tcp(expected: dict[str, Tensor], tmp_path: Path) -> None:
    port = free_port()
    names = ("tcp:bsp", "tcp:dssp")
    with contextlib.ExitStack() as stack:
        agents = []
        for node in (0, 1):
            command, env = torchrun(2, node, 1, port), {"LIGHTNING_STALE_SECRET": "the same on both hosts, and long"}
            agents.append(
                stack.enter_context(script(SCRIPT, tmp_path / str(node), "2", *names, command=command, env=env))
            )
        for agent in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(120)
        for node, agent in enumerate(agents):
            assert agent.returncode == 0, (tmp_path / str(node) / "output.txt").read_text()[-4000:]
    results = [torch.load(tmp_path / str(rank) / f"rank-{rank}.pt") for rank in (0, 1)]
    assert_same(results[0][0][0], expected)
    assert_same(results[1][0][0], expected)
    assert_same(results[0][1][0], results[1][1][0])
    assert_summary(results[1][0][1], "BSP()", updates=STEPS)
    assert_summary(results[1][1][1], "DSSP(lower=3, upper=15, enforce_upper=True)", updates=2 * STEPS)
