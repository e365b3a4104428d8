"""Bad input is refused at construction or at the start of fit, with the value and with what to write instead."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from torch import Tensor, nn

from lightning_stale import DSSP, SSP, StaleSyncStrategy
from lightning_stale.transport import memory
from tests.integration.harness import Worker, run_script, run_workers, workers
from tests.integration.models import Regression, assert_same, loader, trainer, weights

# --- at construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("construct", "error", "texts"),
    [
        (lambda: SSP(threshold=-1), ValueError, ["threshold=-1", "integer >= 0", "SSP(threshold=3)"]),
        (lambda: SSP(threshold=1.5), ValueError, ["threshold=1.5", "integer >= 0", "SSP(threshold=3)"]),
        (lambda: SSP(threshold="3"), ValueError, ["threshold='3'", "integer >= 0", "SSP(threshold=3)"]),
        (lambda: SSP(threshold=True), ValueError, ["threshold=True", "integer >= 0"]),
        (lambda: DSSP(lower=-2, upper=3), ValueError, ["lower=-2", "integer >= 0"]),
        (lambda: DSSP(lower=1, upper=2.0), ValueError, ["upper=2.0", "integer >= 0"]),
        (lambda: DSSP(lower=5, upper=2), ValueError, ["lower=5, upper=2", "DSSP(lower=2, upper=5)"]),
        (lambda: DSSP(enforce_upper=1), ValueError, ["enforce_upper=1", "True or False"]),
        (
            lambda: StaleSyncStrategy(paradigm="sssp"),
            ValueError,
            ["'sssp'", "'bsp', 'asp', 'ssp', 'dssp', 'bounded-delay'", "DSSP("],
        ),
        (lambda: StaleSyncStrategy(paradigm=DSSP), TypeError, ["DSSP is a class", "write DSSP()"]),
        (
            lambda: StaleSyncStrategy(paradigm=3),
            TypeError,
            ["paradigm=3", "'bsp', 'asp', 'ssp', 'dssp', 'bounded-delay'"],
        ),
        (lambda: StaleSyncStrategy(transport="udp"), ValueError, ["'udp'", "'auto', 'shm' or 'tcp'"]),
        (lambda: L.Trainer(accelerator="cpu", strategy="dsssp"), ValueError, ["invalid strategy name", "'dsssp'"]),
    ],
)
def test_refused_at_construction(construct: Callable[[], Any], error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as raised:
        construct()
    for text in texts:
        assert text in str(raised.value)


# --- at the start of fit ----------------------------------------------------------------------------------------------


class With(Regression):
    """A regression that has ``module`` besides."""

    def __init__(self, module: nn.Module, optimizer: str = "SGD") -> None:
        super().__init__(optimizer, lr=0.01)
        self.extra = module


class SparseGradients(Regression):
    """A sparse gradient that no module tells of beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 1))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + nn.functional.embedding(torch.tensor([1]), self.table, sparse=True).sum()


class AddsParameters(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def every_hour() -> Any:
    return ModelCheckpoint(train_time_interval=timedelta(hours=1))


REFUSED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], list[str]]] = {
    "sparse embedding": (
        lambda: With(nn.Embedding(4, 2, sparse=True)),
        {},
        ["extra is an Embedding(sparse=True)", "write Embedding(sparse=False)"],
    ),
    "sparse embedding bag": (
        lambda: With(nn.EmbeddingBag(4, 2, sparse=True)),
        {},
        ["extra is an EmbeddingBag(sparse=True)", "write EmbeddingBag(sparse=False)"],
    ),
    "sparse gradient": (SparseGradients, {}, ["table has a sparse gradient", "Embedding(sparse=False)"]),
    "synchronized batch norm": (
        lambda: With(nn.SyncBatchNorm(2)),
        {},
        ["extra is a SyncBatchNorm", "plain BatchNorm", "GroupNorm"],
    ),
    "sync_batchnorm": (
        lambda: With(nn.BatchNorm1d(2)),
        {"sync_batchnorm": True},
        ["extra", "Trainer(sync_batchnorm=False)"],
    ),
    "lazy module": (lambda: With(nn.LazyLinear(2)), {}, ["extra has parameters without a shape", "configure_model()"]),
    "LBFGS": (lambda: Regression("LBFGS", lr=0.1), {}, ["LBFGS", "torch.optim.AdamW", "strategy='auto'"]),
    "max_time": (Regression, {"max_time": "00:01:00:00"}, ["max_time", "max_steps", "max_epochs"]),
    "Timer": (Regression, {"callbacks": [Timer("00:01:00:00")]}, ["the Timer callback", "max_steps", "max_epochs"]),
    "train_time_interval": (
        Regression,
        {"callbacks": [every_hour()], "enable_checkpointing": True},
        ["train_time_interval", "every_n_train_steps"],
    ),
    "validation by time": (
        Regression,
        {"val_check_interval": timedelta(minutes=1)},
        ["val_check_interval in time", "val_check_interval=0.5"],
    ),
    "param group added": (
        Regression,
        {"callbacks": [AddsParameters()]},
        ["SGD had 4 parameters", "has 5 now", "configure_optimizers", "requires_grad=False"],
    ),
}


def try_all(rank: int) -> dict[str, str]:
    """Return what ``fit`` raises in each case; afterwards, the same process can train."""
    errors = {}
    for name, (model, options, _) in REFUSED.items():
        try:
            trainer(2, "dssp", **{"max_steps": 4, **options}).fit(model(), loader(), loader(samples=16))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    t = trainer(2, "dssp", max_steps=4)
    t.fit(Regression(), loader())
    assert t.strategy.summary()["updates"] == 8
    return errors


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_workers(try_all, 2, tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_fit(name: str, refusals: list[dict[str, str]]) -> None:
    for errors in refusals:
        assert name in errors, "not refused"
        if "RunFailedError" in errors[name]:  # during training, the faster worker is told by the other
            assert "MisconfigurationException" in errors[name]
        else:
            assert errors[name].startswith("MisconfigurationException")
        for text in REFUSED[name][2]:
            assert text in errors[name]


def fit_with_uneven_validation(rank: int, sanity: bool) -> None:
    t = trainer(2, "ssp", max_epochs=1, use_distributed_sampler=False, num_sanity_val_steps=-1 if sanity else 0)
    t.fit(Regression(), loader(samples=32), loader(samples=16 * (1 + rank)))


@pytest.mark.parametrize("sanity", [True, False])
def test_uneven_validation_is_refused(sanity: bool, tmp_path: Path) -> None:
    with workers(fit_with_uneven_validation, 2, tmp_path, sanity) as group:
        ended = group.join(timeout=60)
    assert_error(ended[0], "different numbers of validation batches (rank 0: 2, rank 1: 4)", "limit_val_batches=2")
    assert_error(ended[1], "different numbers of validation batches (rank 0: 2, rank 1: 4)", "limit_val_batches=2")


def assert_error(worker: Worker, *texts: str) -> None:
    assert worker.exitcode == 1
    for text in texts:
        assert text in worker.error, worker.error


# --- the twin package -------------------------------------------------------------------------------------------------

TWIN_SCRIPT = """
{imports}
import traceback

from lightning_stale import DSPStrategy, HPSGDStrategy, StaleSyncStrategy

strategies = ["bsp", "asp", "ssp", "dssp", "DSSP", "bounded-delay", "hpsgd", "dsp", "dsp_notebook", "hpsgd_fork"]
strategies += [StaleSyncStrategy(paradigm="ssp"), HPSGDStrategy(), DSPStrategy()]
for strategy in strategies:
    try:
        pytorch_lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
        print("NOT REFUSED", strategy)
    except Exception as error:
        print("REFUSED", type(error).__name__, error)
pytorch_lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
print("ITS OWN STRATEGIES WORK")
import lightning
print("OURS:", lightning.Trainer(accelerator="cpu", devices=2, strategy="dssp", logger=False).strategy)
"""


@pytest.mark.parametrize(
    "imports", ["import pytorch_lightning\nimport lightning_stale", "import lightning_stale\nimport pytorch_lightning"]
)
def test_the_twin_package_is_refused(imports: str, tmp_path: Path) -> None:
    output = run_script(TWIN_SCRIPT.format(imports=imports), tmp_path).output
    refused = [line for line in output.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 13, output
    for line in refused:
        assert "`pytorch_lightning`" in line
        assert "write `from lightning import LightningModule, Trainer`" in line
    assert "NOT REFUSED" not in output
    assert "ITS OWN STRATEGIES WORK" in output
    assert "OURS: StaleSyncStrategy" in output


# --- too little shared memory -----------------------------------------------------------------------------------------


class NotesMappings(Callback):
    """Notes where the shared memory of this process lies."""

    def __init__(self) -> None:
        self.folders: set[str] = set()

    def on_train_batch_end(self, *_: Any) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = [line.split(maxsplit=5)[5] for line in lines if "/lightning-stale-" in line]
        self.folders |= {str(Path(path).parent) for path in paths}


def fit_with_little_room(rank: int, free: dict[str, int]) -> tuple[set[str], list[str], dict[str, Tensor]]:
    """Train where the folders have as many bytes free; return where the memory was, the warnings and the weights."""
    statvfs_says = memory._free_bytes
    memory._free_bytes = lambda folder: free.get(folder, statvfs_says(folder))
    model, notes = Regression(), NotesMappings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(2, "bsp", max_steps=5, callbacks=[notes]).fit(model, loader())
    return notes.folders, [str(warning.message) for warning in caught], weights(model)


def test_another_folder_is_used_where_dev_shm_is_too_small(tmp_path: Path) -> None:
    roomy = run_workers(fit_with_little_room, 2, tmp_path / "roomy", {})
    tight = run_workers(fit_with_little_room, 2, tmp_path / "tight", {"/dev/shm": 1024})
    for rank in (0, 1):
        assert roomy[rank][0] == {"/dev/shm"}
        assert tight[rank][0] == {tempfile.gettempdir()}
        assert_same(tight[rank][2], roomy[rank][2])
    (warning,) = [text for text in tight[0][1] if "/dev/shm" in text]
    for text in ("/dev/shm has 0 MiB free", f"{tempfile.gettempdir()} is used instead", "--shm-size"):
        assert text in warning
    assert not [text for text in roomy[0][1] if "/dev/shm" in text]


@pytest.mark.parametrize("lies", [False, True], ids=["known", "found out"])
def test_too_little_shared_memory_everywhere_is_an_error(lies: bool, tmp_path: Path) -> None:
    """``lies``: the system promises room that it does not have when it comes to it (here: a folder that is not)."""
    folders = ("/dev/shm", tempfile.gettempdir())
    free = {"/nonexistent": 2**40} if lies else dict.fromkeys(folders, 1024)
    with workers(fit_in_folder, 2, tmp_path, "/nonexistent" if lies else "/dev/shm", free) as group:
        for worker in group.join(timeout=30):
            assert_error(worker, "SharedMemoryError", "shared memory", "/nonexistent" if lies else "has 0 MiB free")
            if not lies:
                assert "StaleSyncStrategy(transport='tcp')" in worker.error


def fit_in_folder(rank: int, folder: str, free: dict[str, int]) -> None:
    memory.SHARED_FOLDER = folder
    fit_with_little_room(rank, free)
