"""What is reached for in torch and in Lightning's launchers is there, and does what it is reached for."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from lightning_stale.private import of_launchers, of_modules, of_torch


def test_versions_rise_with_changes_in_place() -> None:
    one, two = torch.zeros(2), torch.zeros(2)
    before = of_torch.versions_of([one, two])
    one.add_(1)
    after = of_torch.versions_of([one, two])
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_a_view_is_told_from_what_it_views() -> None:
    whole = torch.zeros(4, requires_grad=True).clone()
    assert of_torch.is_view(whole[:2])
    assert not of_torch.is_view(whole)


def test_a_sparse_tensor_is_read_as_it_is() -> None:
    twice = torch.sparse_coo_tensor([[1, 1]], torch.tensor([2.0, 3.0]), (4,))
    indices, values = of_torch.uncoalesced(twice)
    assert indices.tolist() == [[1, 1]]
    assert values.tolist() == [2.0, 3.0]


def test_tree_map_goes_through_what_optimizers_keep() -> None:
    assert of_torch.tree_map(lambda leaf: leaf + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}


def test_children_come_as_often_as_they_are_called() -> None:
    shared = nn.ReLU()
    body = nn.Sequential(nn.Linear(1, 1), shared, nn.Linear(1, 1), shared)
    assert [name for name, _ in of_modules.children(body)] == ["0", "1", "2", "3"]
    assert of_modules.children(body)[3][1] is shared


class Holder(nn.Module):
    statistics: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_parameter("bias", None)
        self.register_buffer("statistics", torch.zeros(1), persistent=False)


def test_a_module_is_asked_for_what_it_holds() -> None:
    holder = Holder()
    assert of_modules.held_names(holder) == ["weight", "bias", "statistics"]
    assert of_modules.holder_of(holder, "bias")["bias"] is None
    new, buffer = nn.Parameter(torch.zeros(1)), torch.ones(1)
    of_modules.holder_of(holder, "weight")["weight"] = new
    of_modules.buffers_of(holder)["statistics"] = buffer
    assert holder.weight is new
    assert holder.statistics is buffer


def test_a_buffer_stays_out_of_the_state_dict() -> None:
    holder = Holder()
    with of_modules.persistence_kept(holder):
        holder.register_buffer("statistics", torch.ones(1))
        assert "statistics" in holder.state_dict()
    assert "statistics" not in holder.state_dict()


@pytest.mark.parametrize(("module", "keeps"), [(nn.BatchNorm2d(1), True), (nn.Linear(1, 1), False)], ids=repr)
def test_who_keeps_statistics(module: nn.Module, keeps: bool) -> None:
    assert of_modules.keeps_statistics(module) is keeps


def test_a_compiled_module_is_known_and_found() -> None:
    plain, in_place = nn.Linear(1, 1), nn.Linear(1, 1)
    wrapped: Any = torch.compile(plain, backend="eager")
    assert not of_modules.is_compiled(plain)
    assert of_modules.is_compiled(wrapped)
    assert of_modules.unwrap(wrapped) is of_modules.unwrap(plain) is plain
    (path,) = [name for name, module in nn.ModuleDict({"a": wrapped}).named_modules() if module is plain]
    assert path != "a"
    assert f"{of_modules.without_wrappers(path + '.weight')}" == "a.weight"
    in_place.compile(backend="eager")
    assert of_modules.is_compiled(in_place)


def test_a_call_of_a_module_with_its_hooks_is_what_the_compiler_makes_of_it() -> None:
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: calls.append("hook"))

    def compiler(function: Any) -> Any:
        return lambda *inputs: (calls.append("compiled"), function(*inputs))[1]

    expected = copy.deepcopy(module)(torch.ones(2))
    calls.clear()
    of_modules.compile_call(module, compiler)
    assert torch.equal(module(torch.ones(2)), expected)
    assert calls == ["compiled", "hook"]


@pytest.mark.parametrize(("strategy", "forks"), [("ddp_spawn", False), ("ddp_fork", True)])
def test_a_launcher_knows_how_it_starts_ranks(strategy: str, forks: bool) -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy.launcher, of_launchers.MultiProcessingLauncher)
    assert of_launchers.forks(trainer.strategy.launcher) is forks


def test_an_attempt_of_torchruns_finds_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's store is that of all attempts, on one host and with a static rendezvous."""
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def store(attempt: int) -> Any:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with of_torch.keys_of_this_attempt():
            return next(torch.distributed.rendezvous("env://"))[0]

    store(0).set("address", "of the first")
    assert agent.check(["address"])
    second = store(1)
    assert not second.check(["address"])
    second.set("address", "of the second")
    assert store(1).get("address") == b"of the second"
    assert not store(2).check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert store(2).get("address") == b"of the first"


def test_torchrun_has_a_folder_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All attempts of a run are told of a file in it; another run has another one."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs

    def folder(logs: DefaultLogsSpecs, attempt: int) -> Path | None:
        environment = {0: {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(attempt)}}
        logs.reify(environment)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", environment[0]["TORCHELASTIC_ERROR_FILE"])
        return of_torch.torchruns_folder()

    logs = DefaultLogsSpecs(str(tmp_path))
    first = folder(logs, 0)
    assert first is not None
    assert first == folder(logs, 1) == folder(logs, 2)
    assert first.parent == tmp_path
    assert folder(DefaultLogsSpecs(str(tmp_path)), 0) != first
    assert folder(DefaultLogsSpecs(os.devnull), 0) is None


LOADER = """
import os, signal, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from lightning_stale.private import of_torch

def come_to_work(worker):
    Path("worker").write_text(str(os.getpid()))
    while not Path("go-on").exists():
        time.sleep(0.05)

if sys.argv[1] == "ends":
    of_torch.end_loaders_with_their_process()
iterator = iter(DataLoader([1, 2, 3], num_workers=1, worker_init_fn=come_to_work, multiprocessing_context="fork"))
while not Path("worker").exists() or not Path("worker").read_text():
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
@pytest.mark.parametrize("ends", [True, False])
def test_a_loaders_process_ends_though_its_own_has_died_before_it_came_to_work(ends: bool, tmp_path: Path) -> None:
    """Without us it does not: then this is not needed any more."""
    process = subprocess.run(
        [sys.executable, "-c", LOADER, "ends" if ends else "stays"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    try:
        (tmp_path / "go-on").touch()
        if ends:
            worker.wait(timeout=60)
        else:
            with pytest.raises(psutil.TimeoutExpired):
                worker.wait(timeout=12)  # it looks every 5 s
    finally:
        with contextlib.suppress(psutil.Error):
            worker.kill()


def test_a_default_group_can_be_made_anew_over_the_same_store(tmp_path: Path) -> None:
    if torch.distributed.is_initialized():  # by a test before this one
        torch.distributed.destroy_process_group()
    hook = sys.excepthook
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    of_torch.form_default_group("gloo", store, "first", 0, 1, timedelta(seconds=5))
    try:
        of_torch.shared_store().set("a", "b")
        torch.distributed.destroy_process_group()
        of_torch.form_default_group("gloo", store, "second", 0, 1, timedelta(seconds=5))
        assert of_torch.shared_store().get("a") == b"b"
        of_torch.rendezvous_store().set("a", "c")
        assert of_torch.shared_store().get("a") == b"b", "under a prefix"
        assert sys.excepthook is hook
    finally:
        torch.distributed.destroy_process_group()
