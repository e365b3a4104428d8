"""A run whose rank 0 or server is killed comes back by itself, and goes on from the newest checkpoint of its own."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.integration.harness import PLAIN, free_port, run_script, script, wait_for_file
from tests.integration.models import assert_same

SUPERVISED = [sys.executable, "-m", "lightning_stale", "run", "--max-restarts", "3"]
SAMPLES, EPOCHS, BATCH, WORKERS = 48, 3, 2, 2

SCRIPT = """
import os
import signal
import sys
from pathlib import Path

import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_stale
from tests.integration.harness import is_server
from tests.integration.models import Ledger, numbered, trainer
from tests.integration.test_restart import BATCH, EPOCHS, SAMPLES
from tests.unit.pipeline.networks import Chain, batches

strategy, victim, at_step, every = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def kill():
    try:
        Path("killed").touch(exist_ok=False)  # once in all attempts
    except FileExistsError:
        return
    pid = os.getpid()
    if victim == "server":
        (pid,) = [p.pid for p in psutil.Process().children() if is_server(p)]
    os.kill(pid, signal.SIGSEGV if victim == "segv" else signal.SIGKILL)


def killed(base):
    class Killed(base):
        def training_step(self, batch, batch_idx):
            with open(f"steps-{self.global_rank}.txt", "a") as file:
                print(self.trainer.global_step, file=file)
            rank = 1 if victim == "rank 1" else 0
            if victim != "nobody" and self.global_rank == rank and self.trainer.global_step >= at_step:
                kill()
            return super().training_step(batch, batch_idx)

    return Killed


saves = ModelCheckpoint(every_n_train_steps=every, save_top_k=-1) if every else ModelCheckpoint()
options = dict(
    max_epochs=EPOCHS, enable_checkpointing=True, callbacks=[saves], logger=CSVLogger("."), log_every_n_steps=1
)
t = trainer(2, strategy, **options)
if strategy == "dsp":
    model, data = killed(Chain)(), batches(20)
else:
    model, data = killed(Ledger)(SAMPLES), numbered(range(SAMPLES))
t.fit(model, data)
if t.is_global_zero:
    torch.save((model.state_dict(), t.global_step), "end.pt")
"""


def torchrun() -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]


def run(folder: Path, strategy: str, victim: str, at_step: int = 30, every: int = 0, torchrun_: bool = False) -> Any:
    """Return weights and steps at the end, the steps that each rank has begun with, and what was printed."""
    command = torchrun() if torchrun_ else SUPERVISED
    ended = run_script(SCRIPT, folder, strategy, victim, str(at_step), str(every), command=command)
    assert ended.returncode == 0, ended.output
    steps = [list(map(int, (folder / f"steps-{rank}.txt").read_text().split())) for rank in range(WORKERS)]
    return *torch.load(folder / "end.pt"), steps, ended.output


def resumed_from(output: str) -> tuple[int, Path]:
    """Return the step and the file that the run says that it goes on from, once."""
    (found,) = re.findall(r"Restart 1 of 3: training goes on from step (\d+), the newest checkpoint .*: (.*)", output)
    return int(found[0]), Path(found[1])


@pytest.mark.parametrize(
    ("strategy", "victim", "torchrun_"),
    [("ssp", "rank 0", False), ("bsp", "segv", True), ("bounded-delay", "rank 1", False)],
)
def test_a_run_goes_on_after_its_last_epoch(strategy: str, victim: str, torchrun_: bool, tmp_path: Path) -> None:
    """Each sample's gradient is in the weights once per epoch; what was trained before the checkpoint is not again."""
    weights, _, steps, output = run(
        tmp_path, strategy, victim, at_step=30 if strategy == "ssp" else 15, torchrun_=torchrun_
    )
    mean = WORKERS if strategy == "bsp" else 1
    assert torch.equal(weights["pages"], torch.full((SAMPLES,), -(2.0**-10) * EPOCHS / mean))
    step, path = resumed_from(output)
    assert path.is_file()
    assert "version_0" in str(path), "saved by the first attempt, and the second one's logger counts on"
    assert step in steps[0][1:]
    assert steps[0].count(0) == 1, "the first epoch is not trained again"


@pytest.mark.parametrize(("victim", "torchrun_"), [("server", False), ("rank 0", True)])
def test_batches_on_demand_go_on_amid_the_epoch(victim: str, torchrun_: bool, tmp_path: Path) -> None:
    """Exactly the rest is trained, though the workers have had different numbers of batches."""
    weights, _, _, output = run(tmp_path, "bounded-delay", victim, at_step=20, every=5, torchrun_=torchrun_)
    assert torch.equal(weights["pages"], torch.full((SAMPLES,), -(2.0**-10) * EPOCHS))
    step, _ = resumed_from(output)
    assert 15 <= step <= 20
    assert step % (SAMPLES // BATCH // WORKERS) != 0, "amid an epoch"


@pytest.mark.parametrize("strategy", ["hpsgd", "dsp"])
def test_strategies_without_a_server_go_on(strategy: str, tmp_path: Path) -> None:
    """As if nobody had been killed."""
    expected, steps, _, output = run(tmp_path / "whole", strategy, "nobody")
    assert "Restart" not in output
    weights, steps_of_two, _, output = run(tmp_path / "killed", strategy, "rank 0")
    assert steps_of_two == steps
    step, _ = resumed_from(output)
    assert 0 < step < steps
    assert_same(weights, expected)


def test_what_another_run_has_left_in_the_folder_is_not_gone_on_from(tmp_path: Path) -> None:
    """A second run in the folder of the first, killed before it has saved anything, begins at the beginning."""
    run(tmp_path, "ssp", "nobody")
    assert list(tmp_path.rglob("*.ckpt"))
    (tmp_path / "steps-0.txt").unlink()
    weights, _, steps, output = run(tmp_path, "ssp", "rank 0", at_step=5)
    assert "Restart 1 of 3: this fit has saved no checkpoint yet, and begins as the script says." in output
    assert steps[0].count(0) == 2
    assert torch.equal(weights["pages"], torch.full((SAMPLES,), -(2.0**-10) * EPOCHS))


TWO_FITS = """
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_stale
from tests.integration.harness import is_server
from tests.integration.models import Ledger, numbered, trainer
from tests.integration.test_restart import SAMPLES


class Counted(Ledger):
    def training_step(self, batch, batch_idx):
        with open("steps.txt", "a") as file:
            print(self.name, file=file)
        if self.name == "second" and self.current_epoch == 1 and not Path("killed").exists() and self.global_rank == 0:
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


model = Counted(SAMPLES)
for name, epochs in (("first", 1), ("second", 2)):
    model.name = name
    t = trainer(2, "asp", max_epochs=epochs, enable_checkpointing=True, callbacks=[ModelCheckpoint()])
    t.fit(model, numbered(range(SAMPLES)), ckpt_path=None)
if t.is_global_zero:
    torch.save(model.state_dict(), "end.pt")
"""


def test_a_fit_that_had_ended_is_not_trained_again_and_the_next_has_its_weights(tmp_path: Path) -> None:
    ended = run_script(TWO_FITS, tmp_path, command=SUPERVISED)
    assert ended.returncode == 0, ended.output
    assert torch.equal(torch.load(tmp_path / "end.pt")["pages"], torch.full((SAMPLES,), -(2.0**-10) * 3))
    steps = (tmp_path / "steps.txt").read_text().split()
    assert steps.count("first") == SAMPLES // BATCH
    assert len(re.findall("Restart 1 of 3: training goes on", ended.output)) == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_a_supervised_run_ends_it_for_good(signum: int, tmp_path: Path) -> None:
    arguments = ("bsp", "nobody", "0", "0")
    code = SCRIPT.replace("max_epochs=EPOCHS", "max_epochs=-1")
    with script(code, tmp_path, *arguments, command=SUPERVISED, env=PLAIN) as process:
        for rank in range(WORKERS):
            wait_for_file(tmp_path / f"steps-{rank}.txt")
        os.kill(process.pid, signum)
        process.wait(60)
    output = (tmp_path / "output.txt").read_text()
    assert "Restart" not in output
    assert "restart" not in output
    assert process.returncode == (0 if signum == signal.SIGTERM else 1), output


def test_a_run_ends_with_its_supervisor(tmp_path: Path) -> None:
    """The harness sees that nothing is left."""
    code = SCRIPT.replace("max_epochs=EPOCHS", "max_epochs=-1")
    with script(code, tmp_path, "bsp", "nobody", "0", "0", command=SUPERVISED, env=PLAIN) as process:
        for rank in range(WORKERS):
            wait_for_file(tmp_path / f"steps-{rank}.txt")
        (rank_0,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait(30)
        psutil.wait_procs([rank_0], timeout=30)
    assert "rank 0 received SIGTERM: the run ends" in (tmp_path / "output.txt").read_text()
