"""Every way of failing ends the whole run, on every rank, with an error that says what happened; nothing is left.

The time limits are those of ``join``: what does not end is a failure. That no process and no shared memory is left is
checked by the harness on the way out of ``workers`` and ``script``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.integration.harness import PLAIN, Worker, run_script, script, signal_test, wait_for_file, workers
from tests.integration.models import Regression, loader, trainer

ENDLESS = {"max_epochs": -1}


class Faulty(Regression):
    """Trains until something happens; says when it has got under way, and raises where it is told to."""

    def __init__(self, folder: Path, raises: str = "", on_rank: int = -1) -> None:
        super().__init__()
        self.folder, self.raises, self.on_rank = folder, raises, on_rank

    def fault(self, place: str) -> None:
        if self.raises == place and self.global_rank == self.on_rank:
            raise ValueError(f"a fault in {place} of rank {self.global_rank}")
        if self.raises == f"SIGKILL {place}" and self.global_rank == self.on_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self) -> None:
        self.fault("on_train_start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step >= 3:
            signal_test(self.folder, f"under-way-{self.global_rank}")
            self.fault("training_step")
        if self.current_epoch >= 1:
            signal_test(self.folder, f"second-epoch-{self.global_rank}")
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.fault("validation_step")
        if "beside a collective" in self.raises:
            self.fault("beside a collective")
            torch.distributed.all_reduce(torch.zeros(1))  # the user's, or of torchmetrics: not seen by the strategy
        super().validation_step(batch, batch_idx)


def train(rank: int, folder: Path, strategy: Any, fault: tuple[str, int] = ("", -1), **options: Any) -> None:
    """Train on two ranks; ``options``: of the Trainer, and ``num_workers``, ``validates``."""
    num_workers, validates = options.pop("num_workers", 0), options.pop("validates", False)
    t = trainer(2, strategy, **{**ENDLESS, **options})
    validation = loader(samples=32) if validates else None
    t.fit(Faulty(folder, *fault), loader(num_workers=num_workers), validation)


def tcp(paradigm: str) -> Any:
    from lightning_stale import StaleSyncStrategy

    return StaleSyncStrategy(paradigm=paradigm, transport="tcp")


def under_way(group: Any) -> None:
    for rank in (0, 1):
        group.wait_for(f"under-way-{rank}")


def assert_failed(worker: Worker, *texts: str) -> None:
    assert worker.exitcode == 1, f"rank {worker.rank} ended with {worker.exitcode}: {worker.error}"
    for text in texts:
        assert text in worker.error, f"rank {worker.rank} does not say {text!r}:\n{worker.error}"


# --- killed processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", ["bsp", "asp", "bounded-delay", tcp("dssp")], ids=["bsp", "asp", "bounded-delay", "dssp-tcp"]
)
def test_every_worker_names_the_server_when_it_is_killed(strategy: Any, tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, tmp_path, strategy) as group:
        under_way(group)
        server = group.server()
        server.kill()
        for worker in group.join(timeout=10):
            assert_failed(
                worker, "ServerLostError", f"rank {worker.rank} has lost the parameter server", str(server.pid)
            )


@pytest.mark.parametrize(
    ("killed", "strategy", "num_workers"),
    [(1, "bsp", 0), (0, "asp", 0), (1, tcp("ssp"), 0), (0, "bsp", 1), (1, "dssp", 1)],
)
def test_the_others_name_a_worker_that_is_killed(killed: int, strategy: Any, num_workers: int, tmp_path: Path) -> None:
    """In the second epoch, the DataLoader's workers have been forked with the open connections, and hold them."""
    with workers(train, 2, tmp_path, tmp_path, strategy, num_workers=num_workers) as group:
        group.wait_for(f"second-epoch-{killed}")
        os.kill(group.pid(killed), signal.SIGKILL)
        ended = group.join(timeout=10)
        assert ended[killed].exitcode == -signal.SIGKILL
        assert_failed(ended[1 - killed], "RunFailedError", f"rank {killed}")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_worker_is_named_that_is_killed_while_the_others_wait_for_it_in_a_collective(
    killed: int, tmp_path: Path
) -> None:
    with workers(
        train, 2, tmp_path, tmp_path, "asp", fault=("SIGKILL beside a collective", killed), validates=True
    ) as group:
        ended = group.join(timeout=30)
    assert ended[killed].exitcode == -signal.SIGKILL
    # what happened first stands before what it led to
    assert_failed(ended[1 - killed], f"RunFailedError: rank {killed}", "direct cause", "RuntimeError", "gloo")


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "on_rank", "strategy"),
    [
        ("on_train_start", 0, "bsp"),
        ("on_train_start", 1, "dssp"),
        ("training_step", 0, "bsp"),
        ("training_step", 1, "asp"),
        ("training_step", 1, tcp("ssp")),
        ("validation_step", 0, "dssp"),
        ("validation_step", 1, "bsp"),
        ("beside a collective", 1, "asp"),
    ],
)
def test_an_exception_in_one_worker_is_shown_by_all(place: str, on_rank: int, strategy: Any, tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, tmp_path, strategy, fault=(place, on_rank), validates=True) as group:
        ended = group.join(timeout=30)
    fault = f"ValueError: a fault in {place} of rank {on_rank}"
    assert_failed(ended[on_rank], fault)
    assert "RunFailedError" not in ended[on_rank].error
    if place == "on_train_start":  # there is no server yet
        assert_failed(ended[1 - on_rank], "RunFailedError", "a worker ended before training started")
    else:
        traceback = (f"rank {on_rank} raised ValueError", f'self.fault("{place}")', fault)
        assert_failed(ended[1 - on_rank], "RunFailedError", *traceback)


class RaisingSGD(torch.optim.SGD):
    """The user's optimizer, with a fault in its fourth step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 4:
            raise ArithmeticError("a fault in the user's optimizer")
        return super().step(closure)


class WithRaisingSGD(Regression):
    def configure_optimizers(self) -> Any:
        return RaisingSGD(self.parameters(), lr=0.01)


def train_with_a_raising_optimizer(rank: int, strategy: Any) -> None:
    trainer(2, strategy, **ENDLESS).fit(WithRaisingSGD(), loader())


@pytest.mark.parametrize("strategy", ["bsp", "asp"])
def test_an_exception_in_the_optimizer_is_shown_by_all(strategy: str, tmp_path: Path) -> None:
    with workers(train_with_a_raising_optimizer, 2, tmp_path, strategy) as group:
        for worker in group.join(timeout=30):
            assert_failed(
                worker, "RunFailedError", "the parameter server failed", "ArithmeticError: a fault in the user's"
            )
            assert 'raise ArithmeticError("a fault' in worker.error  # the traceback, down to the line


def train_and_save_on_exception(rank: int, world_size: int, folder: Path, interrupted: bool) -> list[str]:
    """Return the steps of the checkpoints that a failing run leaves."""
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    fault = ("", -1) if interrupted else ("training_step", world_size - 1)
    t = trainer(world_size, "ssp", **ENDLESS, enable_checkpointing=True, callbacks=[OnExceptionCheckpoint(folder)])
    with pytest.raises(SystemExit if interrupted else (ValueError, RuntimeError)):
        t.fit(Faulty(folder, *fault), loader())
    checkpoint = torch.load(folder / "on_exception.ckpt", weights_only=False)
    assert checkpoint["lightning_stale"]["updates"] >= 3
    Regression().load_state_dict(checkpoint["state_dict"])
    return sorted(checkpoint["optimizer_states"][0])


@pytest.mark.parametrize(("world_size", "interrupted"), [(1, False), (2, False), (2, True)])
def test_a_checkpoint_can_be_saved_on_an_exception(world_size: int, interrupted: bool, tmp_path: Path) -> None:
    with workers(train_and_save_on_exception, world_size, tmp_path, world_size, tmp_path, interrupted) as group:
        if interrupted:
            for rank in range(world_size):
                group.wait_for(f"under-way-{rank}")
            for rank in range(world_size):
                os.kill(group.pid(rank), signal.SIGINT)
        for worker in group.join(timeout=30):  # an exception may come before the other rank is under way
            assert worker.result == ["param_groups", "state"], worker.error


# --- workers that meet at different places ----------------------------------------------------------------------------


def train_unevenly(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """Rank 0 has 4 batches, rank 1 has 8."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    callbacks = []
    if steps := options.pop("every_n_train_steps", None):
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=steps, save_top_k=-1))
    options |= {"max_epochs": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    t = trainer(2, "ssp", callbacks=callbacks, **options)
    t.fit(Regression(), loader(samples=32 * (1 + rank)), loader(samples=16))


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"every_n_train_steps": 6}, ("a collective operation (reduce) (step 6)", "validation (step 4)")),
        ({"val_check_interval": 3}, ("validation (step 6)", "the end of an epoch (step 4)")),
    ],
)
def test_workers_at_different_places_are_told_so(options: dict[str, Any], places: Any, tmp_path: Path) -> None:
    with workers(train_unevenly, 2, tmp_path, tmp_path, options) as group:
        for worker in group.join(timeout=60):
            assert_failed(worker, "the workers met at different places", *places, "val_check_interval=1.0")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "on_rank", "strategy", "raised", "told"),
    [
        (signal.SIGTERM, 0, "bsp", "SIGTERMException", "received SIGTERM"),
        (signal.SIGTERM, 2, "ssp", "SIGTERMException", ""),
        (signal.SIGTERM, 1, "asp", "SIGTERMException", "received SIGTERM"),
        (signal.SIGINT, 1, "dssp", "KeyboardInterrupt", "was interrupted"),
    ],
)
def test_a_signal_to_one_worker_ends_all_alike(
    signum: int, on_rank: int, strategy: str, raised: str, told: str, tmp_path: Path
) -> None:
    """``on_rank=2``: to both."""
    with workers(train, 2, tmp_path, tmp_path, strategy) as group:
        under_way(group)
        for rank in (0, 1):
            if on_rank in (rank, 2):
                os.kill(group.pid(rank), signum)
        ended = group.join(timeout=30)
    for worker in ended:
        assert_failed(worker, raised)
    if on_rank < 2:
        assert_failed(ended[1 - on_rank], f"rank {on_rank} {told}")
        assert "RunFailedError" not in ended[on_rank].error


SCRIPT = """
from pathlib import Path
from tests.integration.models import loader, trainer
from tests.integration.test_failures import Faulty

import lightning_stale

trainer(2, "ssp", max_epochs=-1).fit(Faulty(Path(".")), loader())
"""


@pytest.mark.parametrize(
    ("signum", "to", "returncodes", "said"),
    [
        (signal.SIGINT, "group", (1,), "Detected KeyboardInterrupt"),
        (signal.SIGINT, "rank 0", (1,), "Detected KeyboardInterrupt"),
        (signal.SIGTERM, "rank 0", (0,), "rank 0 received SIGTERM: the run ends"),
        (signal.SIGKILL, "rank 0", (-signal.SIGKILL,), "RunFailedError: rank 0"),
        # Lightning's launcher sees it too, says "[rank: 1] Child process with PID ..." and kills rank 0
        (
            signal.SIGKILL,
            "rank 1",
            (1, -signal.SIGKILL),
            "RunFailedError: rank 1 (process {0}) is gone|PID {0} terminated",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
)
def test_a_signal_ends_a_script(signum: int, to: str, returncodes: Any, said: str, tmp_path: Path) -> None:
    """Lightning's popen launcher: rank 0 is the script that the user has started, rank 1 its child."""
    with script(SCRIPT, tmp_path, env=PLAIN) as process:
        for name in ("second-epoch-0", "second-epoch-1"):
            wait_for_file(tmp_path / name)
        (child,) = (p for p in psutil.Process(process.pid).children() if p.environ().get("LOCAL_RANK") == "1")
        if to == "group":
            os.killpg(process.pid, signum)
        else:
            os.kill({"rank 0": process.pid, "rank 1": child.pid}[to], signum)
        process.wait(30)
        psutil.wait_procs([child], timeout=30)
    output = (tmp_path / "output.txt").read_text()
    assert process.returncode in returncodes, output
    assert any(text in output for text in said.format(child.pid).split("|")), output
    if signum != signal.SIGKILL:
        assert "Traceback" not in output


LOST_RENDEZVOUS = """
import os
import signal
from pathlib import Path

from lightning_stale import StaleSyncStrategy
from tests.integration.harness import wait_for_file
from tests.integration.models import Regression, loader, trainer


class Dying(StaleSyncStrategy):
    def setup_environment(self):
        if self.local_rank == 0:
            wait_for_file(Path("rank-1"))
            os.kill(os.getpid(), signal.SIGKILL)
        Path("rank-1").touch()
        super().setup_environment()


trainer(2, Dying(), max_epochs=1).fit(Regression(), loader())
"""


def test_a_rank_does_not_wait_for_a_rank_0_that_dies_before_they_have_found_each_other(tmp_path: Path) -> None:
    """The harness waits 10 s for what is left; torch's rendezvous, 10 minutes."""
    ended = run_script(LOST_RENDEZVOUS, tmp_path, env=PLAIN)
    assert ended.returncode == -signal.SIGKILL
    assert "rank 0 has ended before this rank" in ended.output
