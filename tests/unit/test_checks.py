"""What cannot work is refused, each with what to write instead; what can work is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import nn

from lightning_stale import DSPStrategy, Elastic, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.strategies.checks import (
    check_device,
    check_model,
    check_optimizers,
    check_trainer,
    check_validation_batches,
)
from lightning_stale.strategies.wrong_package import TwinPackageError, refuse_environment


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path, barebones=False, **options)


TRAINERS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "max_time": (lambda: {"max_time": "00:01:00:00"}, ("Trainer(max_time=...)", "Timer(duration, interval='epoch')")),
    "Timer": (lambda: {"callbacks": [Timer(timedelta(hours=1))]}, ("the Timer callback", "Trainer(max_epochs=...)")),
    "train_time_interval": (
        lambda: {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=1))]},
        ("ModelCheckpoint(train_time_interval=...)", "ModelCheckpoint(every_n_train_steps=...)"),
    ),
    "val_check_interval": (
        lambda: {"val_check_interval": timedelta(minutes=1)},
        ("a val_check_interval in time", "val_check_interval=0.5"),
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_that_are_refused(name: str, tmp_path: Path) -> None:
    options, parts = TRAINERS[name]
    with pytest.raises(MisconfigurationException) as error:
        check_trainer(trainer(tmp_path, **options()))
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 10, "val_check_interval": 5},
        {"callbacks": [Timer(timedelta(hours=1), interval="epoch")]},
        {"callbacks": [Timer()]},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"callbacks": [ModelCheckpoint(every_n_train_steps=5), ModelCheckpoint(every_n_epochs=1, filename="other")]},
    ],
)
def test_trainers_that_pass(options: dict[str, Any], tmp_path: Path) -> None:
    assert check_trainer(trainer(tmp_path, **options)) is None


@pytest.mark.parametrize("kind", ["mps", "xla", "meta"])
def test_devices_that_are_refused(kind: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"workers cannot run on '{kind}'") as error:
        check_device(torch.device(kind))
    assert "Trainer(accelerator='cpu')" in str(error.value)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_devices_that_pass(device: str) -> None:
    assert check_device(torch.device(device)) is None


def nested(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"part": module}))


MODELS: dict[str, tuple[Callable[[], nn.Module], bool, tuple[str, ...]]] = {
    "SyncBatchNorm": (
        lambda: nested(nn.SyncBatchNorm(2)),
        False,
        ("1.part is a SyncBatchNorm", "Trainer(sync_batchnorm=False)", "plain BatchNorm"),
    ),
    "the model itself": (lambda: nn.SyncBatchNorm(2), False, ("the model is a SyncBatchNorm",)),
    "sync_batchnorm": (
        lambda: nested(nn.BatchNorm2d(2)),
        True,
        ("1.part is a SyncBatchNorm (or sync_batchnorm=True)",),
    ),
    "Embedding": (
        lambda: nested(nn.Embedding(3, 2, sparse=True)),
        False,
        ("1.part is an Embedding(sparse=True)", "sparse gradients cannot be pushed", "write Embedding(sparse=False)"),
    ),
    "EmbeddingBag": (
        lambda: nested(nn.EmbeddingBag(3, 2, sparse=True)),
        False,
        ("1.part is an EmbeddingBag(sparse=True)", "write EmbeddingBag(sparse=False)"),
    ),
    "lazy": (
        lambda: nested(nn.LazyLinear(3)),
        False,
        ("1.part has parameters without a shape yet", "configure_model()"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_refused(name: str) -> None:
    make, synchronizes, parts = MODELS[name]
    with pytest.raises(MisconfigurationException) as error:
        check_model(make(), synchronizes, sparse_gradients=False)
    assert all(part in str(error.value) for part in parts), str(error.value)


def ran_lazy() -> nn.Module:
    module = nn.LazyLinear(3)
    module(torch.zeros(1, 2))
    return module


@pytest.mark.parametrize(
    ("module", "synchronizes"),
    [
        (nn.BatchNorm1d(2), False),
        (nn.GroupNorm(1, 2), True),
        (nn.Embedding(3, 2), True),
        (ran_lazy(), False),
        (nn.Sequential(), False),
    ],
    ids=repr,
)
def test_models_that_pass(module: nn.Module, synchronizes: bool) -> None:
    assert check_model(nested(module), synchronizes, sparse_gradients=False) is None


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, 2))]


def test_lbfgs_is_refused() -> None:
    optimizers = [torch.optim.SGD(parameters(), lr=0.1), torch.optim.LBFGS(parameters())]
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times") as error:
        check_optimizers(optimizers)
    assert "torch.optim.AdamW" in str(error.value)


def test_other_optimizers_pass() -> None:
    assert check_optimizers([]) is None
    assert check_optimizers([torch.optim.Adam(parameters()), torch.optim.Muon(parameters())]) is None


def validating_trainer(
    counts: list[list[int]], world_size: int, sanity: bool = False, mine: float | None = None
) -> Any:
    """A trainer of rank 0; ``counts``: by rank and loader, the numbers of validation batches."""
    asked: list[list[int]] = []

    def all_gather(count: torch.Tensor) -> torch.Tensor:
        asked.append(count.tolist())
        return torch.tensor(counts)

    batches = counts[0] if mine is None else [mine]
    return SimpleNamespace(
        asked=asked,
        sanity_checking=sanity,
        num_sanity_val_batches=batches if sanity else [10**6],
        num_val_batches=[10**6] if sanity else batches,
        world_size=world_size,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), all_gather=all_gather),
    )


@pytest.mark.parametrize("sanity", [False, True])
def test_uneven_validation_is_refused_with_the_numbers(sanity: bool) -> None:
    fake = validating_trainer([[5], [4], [5]], 3, sanity)
    with pytest.raises(MisconfigurationException) as error:
        check_validation_batches(fake)
    assert "(rank 0: 5, rank 1: 4, rank 2: 5)" in str(error.value)
    assert "Trainer(limit_val_batches=4)" in str(error.value)
    assert fake.asked == [[5]]


def test_loaders_are_compared_one_by_one() -> None:
    with pytest.raises(MisconfigurationException, match=r"\(rank 0: 2\+3, rank 1: 3\+2\)"):
        check_validation_batches(validating_trainer([[2, 3], [3, 2]], 2))


@pytest.mark.parametrize("sanity", [False, True])
def test_even_validation_passes(sanity: bool) -> None:
    fake = validating_trainer([[5], [5]], 2, sanity)
    check_validation_batches(fake)
    assert fake.asked == [[5]]


@pytest.mark.parametrize(
    "fake",
    [validating_trainer([[5]], 1), validating_trainer([[5], [4]], 2, mine=float("inf"))],
    ids=["one worker", "no known length"],
)
def test_where_there_is_nothing_to_compare_nobody_is_asked(fake: Any) -> None:
    check_validation_batches(fake)
    assert fake.asked == []


# --- before any rank is started -----------------------------------------------------------------------------------


class Normed(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", ["bsp", "dssp", "bounded-delay", "hpsgd", "dsp", "dsp_fork", "hpsgd_spawn"])
@pytest.mark.parametrize("refused", ["sync_batchnorm", "max_time"])
def test_what_no_rank_could_run_starts_none(
    name: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: started.append("popen"))
    monkeypatch.setattr("torch.multiprocessing.start_processes", lambda *_, **__: started.append("fork"))
    options: dict[str, Any] = {"sync_batchnorm": True} if refused == "sync_batchnorm" else {"max_time": "00:01:00:00"}
    t = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False, default_root_dir=tmp_path, **options)
    with pytest.raises(MisconfigurationException, match=refused):
        t.fit(Normed(), [torch.zeros(2, 4)])
    assert started == []


@pytest.mark.parametrize("name", ["bsp", "dssp", "bounded-delay", "hpsgd", "dsp"])
def test_a_notebook_is_told_the_name_to_write(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = f"{name}_notebook"
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    with pytest.raises(MisconfigurationException, match=rf"Trainer\(strategy='{writes}'\).*start_method='fork'"):
        Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
    for devices, works in ((1, name), (2, writes)):
        assert Trainer(accelerator="cpu", devices=devices, strategy=works, logger=False)


# --- elastic runs -------------------------------------------------------------------------------------------------

_INSTEAD = "python -m lightning_stale run"


@pytest.mark.parametrize("value", [True, Elastic(), None])
@pytest.mark.parametrize(
    ("strategy", "reason"),
    [(HPSGDStrategy, "average in collectives of all"), (DSPStrategy, "holds a part of the model that no other has")],
)
def test_a_strategy_whose_workers_cannot_be_done_without_is_not_elastic(
    strategy: Callable[..., Any], reason: str, value: object
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{strategy.__name__}(elastic={value!r}): ")) as error:  # type: ignore[attr-defined]
        strategy(elastic=value)
    assert all(part in str(error.value) for part in (reason, _INSTEAD, "StaleSyncStrategy(elastic=True)"))
    assert repr(strategy(elastic=False)) == repr(strategy())


ELASTIC: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "shards": ({"data": "shards"}, ValueError, ("data='shards'", "would be lost", "data='auto'", "elastic=False")),
    "spawn": ({"start_method": "spawn"}, ValueError, ("start_method='spawn'", "start_method='popen'", "elastic=False")),
    "fork": ({"start_method": "fork"}, ValueError, ("start_method='fork'", "start_method='popen'", "elastic=False")),
    "None": ({"elastic": None}, TypeError, ("elastic=None", "elastic=Elastic(min_workers=...)")),
    "a number": ({"elastic": 2}, TypeError, ("elastic=2", "elastic=True, elastic=False")),
}


@pytest.mark.parametrize("name", ELASTIC)
def test_what_an_elastic_run_cannot_have(name: str) -> None:
    options, kind, parts = ELASTIC[name]
    with pytest.raises(kind) as error:
        StaleSyncStrategy(**{"elastic": True, **options})
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("where", ["torchrun", "a notebook"])
def test_where_no_run_is_elastic(where: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is a Trainer."""
    if where == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # its name where the user has given none
        variables = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": str(devices)}
        for variable, value in {**variables, "LOCAL_WORLD_SIZE": str(devices)}.items():
            monkeypatch.setenv(variable, value)
    else:
        monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    makes: dict[str, Any] = {"accelerator": "cpu", "devices": devices, "logger": False}
    with pytest.raises(MisconfigurationException) as error:
        Trainer(strategy=StaleSyncStrategy(elastic=Elastic(min_workers=2)), **makes)
    cures = ("python train.py", "torchrun --max-restarts=3") if where == "torchrun" else ("train in a script",)
    for part in ("elastic=Elastic(min_workers=2, max_restarts=3", where, "elastic=False", *cures):
        assert part in str(error.value), str(error.value)
    assert where == "a notebook" or Trainer(strategy=StaleSyncStrategy(), **makes)


# --- the strategy's own arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"paradigm": "sssp"}, ValueError, "paradigm='sssp' is unknown"),
        ({"paradigm": 3}, TypeError, "paradigm=3"),
        ({"transport": "udp"}, ValueError, "transport='udp' is unknown: write 'auto', 'shm' or 'tcp'"),
        ({"transport": None}, ValueError, "transport=None is unknown"),
        ({"data": "on_demand"}, ValueError, "data='on_demand' is unknown: write 'auto', 'on-demand' or 'shards'"),
        ({"data": None}, ValueError, "data=None is unknown"),
    ],
    ids=repr,
)
def test_bad_arguments_of_the_strategy(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        StaleSyncStrategy(**arguments)


def test_before_fit_the_summary_has_the_thresholds_of_the_next() -> None:
    strategy = StaleSyncStrategy(paradigm="bounded-delay", data="on-demand")
    assert repr(strategy) == "StaleSyncStrategy(paradigm=BoundedDelay(delay=None), transport='auto', data='on-demand')"
    assert strategy.summary()["thresholds"] == {"delay": 2}, "of one worker"
    strategy.set_thresholds(delay=5)
    assert strategy.summary() == {
        "paradigm": "BoundedDelay(delay=5)",
        "thresholds": {"delay": 5},
        "apply": "Plain()",
        "updates": 0,
        "joins": 0,
        "leaves": 0,
        "taken_back": 0,
        "phases": [],
        "workers": [],
    }


def test_shared_memory_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_stale.transport.memory.supported", lambda: False)
    with pytest.raises(ValueError, match="transport='shm' needs Linux: write transport='auto' or 'tcp'"):
        StaleSyncStrategy(transport="shm")
    assert StaleSyncStrategy(transport="auto").transport == "auto"


@pytest.mark.parametrize("package", ["pytorch_lightning.plugins.environments", "lightning_fabric.plugins"])
def test_the_twin_package_is_refused(package: str) -> None:
    environment = type("LightningEnvironment", (), {"__module__": package})()
    with pytest.raises(TwinPackageError, match="from lightning import LightningModule, Trainer"):
        refuse_environment(environment)


def test_our_own_package_is_not_the_twin() -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    assert refuse_environment(LightningEnvironment()) is None
    assert refuse_environment(None) is None
