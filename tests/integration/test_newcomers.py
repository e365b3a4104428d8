"""Who comes while a fit runs takes part in it: in the place of one that has died, or as a further worker."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import MARK, ROOT, Script, run_script, script, wait_for_file
from tests.integration.test_restart import SUPERVISED

SCRIPT = f"""
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_stale import Elastic, StaleSyncStrategy
from tests.integration.harness import wait_for_file
from tests.integration.models import Ledger, numbered

CASE = json.loads(os.environ["CASE"])
NEWCOMER = "LIGHTNING_STALE_JOIN" in os.environ
SAMPLES = 120


class Model(Ledger):
    fits = 0

    def on_fit_start(self):
        self.fits += 1
        self.batches = 0

    def on_train_epoch_start(self):
        if NEWCOMER:
            Path("came").touch()

    def training_step(self, batch, batch_idx):
        self.batches += 1
        Path(f"began-{{self.fits}}-{{self.batches}}-{{self.global_rank}}").touch()
        if self.global_rank == CASE.get("dies") and self.batches == 3 and self.fits == CASE.get("fit", 1):
            if not Path("died").exists():
                Path("died").touch()
                if CASE.get("raises"):
                    raise ValueError("a bug of rank 2's")
                if CASE.get("hangs"):
                    Path("hangs").write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGSTOP)
                    return super().training_step(batch, batch_idx)
                os.kill(os.getpid(), signal.SIGKILL)
        if self.global_rank == 0 and self.current_epoch == 2 and CASE.get("rank 0 too") and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.global_rank == 0 and self.current_epoch == 1 and CASE.get("hangs") and Path("hangs").exists():
            assert self.trainer.strategy.summary()["leaves"] == 1  # or else the meeting of the epoch had waited for it
            os.kill(int(Path("hangs").read_text()), signal.SIGCONT)
            Path("hangs").unlink()
        if self.global_rank == 0 and self.current_epoch == 1 and CASE.get("await"):
            wait_for_file(Path(CASE["await"]))
        self.log("trained", 1.0, on_step=False, on_epoch=True, sync_dist=True)  # by late ones too
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(batch[0].tolist())

    def on_validation_epoch_start(self):
        self.seen = []


def main(config=None):
    model = Model(SAMPLES)
    for number in range(CASE.get("fits", 1)):
        elastic = Elastic(max_restarts=CASE.get("max_restarts", 3), patience_s=CASE.get("patience_s", 30.0))
        strategy = StaleSyncStrategy(paradigm=CASE.get("paradigm", "asp"), elastic=elastic)
        trainer = L.Trainer(
            accelerator="cpu", devices=3, strategy=strategy, max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint("saved", save_top_k=-1, every_n_train_steps=CASE.get("every"))],
            **CASE.get("options", {{}}),
        )
        if CASE.get("validates"):
            trainer.validate(model, numbered(range(12)), verbose=False)
        trainer.fit(model, numbered(range(SAMPLES)), numbered(range(12)))
    pages = (model.pages.detach() / -model.lr).tolist()
    each = trainer.accumulate_grad_batches
    assert set(pages) == {{3.0 * CASE.get("fits", 1) / each}}, pages
    assert trainer.global_step == CASE.get("steps", 60 // each)
    if trainer.is_global_zero:
        summary = strategy.summary()
        print("RESULT", json.dumps({{name: summary[name] for name in ("joins", "leaves", "updates")}}), flush=True)
    Path(f"finished-{{os.getpid()}}").touch()


if __name__ == "__main__":
    if CASE.get("hydra"):
        import hydra

        main = hydra.main(version_base="1.3", config_path=None)(main)
    main()
"""


def run(folder: Path, command: list[str] | None = None, **case: Any) -> Script:
    return run_script(SCRIPT, folder, command=command, env={"CASE": json.dumps(case)}, timeout=170.0)


def result_of(output: str) -> dict[str, int]:
    found = re.search("RESULT (.*)", output)
    assert found, output[-8000:]
    result: dict[str, int] = json.loads(found[1])
    return result


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"options": {"val_check_interval": 0.25}, "paradigm": "bounded-delay"},
        {"options": {"accumulate_grad_batches": 2, "val_check_interval": 10}, "paradigm": "ssp"},
        {"every": 1},
        {"hydra": True},
    ],
    ids=[
        "asp",
        "bounded-delay, validation amid epochs",
        "ssp, accumulation",
        "a collective is the first that it meets the others for",
        "in a Hydra job",
    ],
)
def test_one_takes_the_place_of_one_that_has_died(case: dict[str, Any], tmp_path: Path) -> None:
    case = {"dies": 2, "await": "came", **case}
    done = run(tmp_path, **case)
    assert done.returncode == 0, done.output[-8000:]
    result = result_of(done.output)
    assert (result["joins"], result["leaves"]) == (1, 1)
    assert re.search(
        r"rank 2 \(process \d+\) was killed by SIGKILL: process \d+ takes its place, 2 replacements are left",
        done.output,
    )
    assert done.output.count("takes its place") == 1
    assert len(list(tmp_path.glob("finished-*"))) == 3
    assert not list(tmp_path.glob("saved-v*")), "it writes where rank 0 does, and not besides"


def test_one_that_was_given_up_and_wakes_is_told_so_and_replaced(tmp_path: Path) -> None:
    """What it computed before is not applied: the batch was somebody else's by then."""
    done = run(tmp_path, dies=2, hangs=True, patience_s=3.0, **{"await": "came"})
    assert done.returncode == 0, done.output[-8000:]
    assert "or it has given this rank up, which gave no sign of life for too long" in done.output
    assert re.search(r"rank 2 \(process \d+\) ended with exit code 1: process \d+ takes its place", done.output)
    result = result_of(done.output)
    assert (result["joins"], result["leaves"], result["updates"]) == (1, 1, 180)
    assert len(list(tmp_path.glob("finished-*"))) == 3


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"max_restarts": 0}, r"is not replaced: max_restarts=0; the others go on without it"),
        ({"fits": 2, "fit": 2}, r"is not replaced: this fit is not the first of the script, which a new process would"),
        ({"validates": True}, r"is not replaced: this fit is not the first of the script, which a new process would"),
    ],
    ids=["no restart is left", "in a second fit", "in a fit after a validation"],
)
def test_one_that_is_not_replaced_is_done_without(case: dict[str, Any], said: str, tmp_path: Path) -> None:
    done = run(tmp_path, dies=2, **case)
    assert done.returncode == 0, done.output[-8000:]
    assert re.search(said, done.output), done.output[-8000:]
    assert "takes its place" not in done.output
    assert result_of(done.output)["leaves"] == 1
    assert len(list(tmp_path.glob("finished-*"))) == 2


def test_a_fit_after_one_that_has_lost_somebody_is_of_those_who_are_left(tmp_path: Path) -> None:
    """Rank 2 is rank 1 of two in it: nobody waits for a third, or takes it for one who was lost."""
    done = run(tmp_path, dies=1, max_restarts=0, fits=2, steps=90)
    assert done.returncode == 0, done.output[-8000:]
    assert result_of(done.output) == {"joins": 0, "leaves": 0, "updates": 180}
    assert len(list(tmp_path.glob("finished-*"))) == 2


def test_an_error_of_its_own_ends_the_run_for_all(tmp_path: Path) -> None:
    done = run(tmp_path, dies=2, raises=True, **{"await": "never"})
    assert done.returncode != 0
    assert "a bug of rank 2's" in done.output
    assert not list(tmp_path.glob("finished-*"))


def test_a_run_that_ends_with_rank_0_comes_back_and_is_elastic_again(tmp_path: Path) -> None:
    """What was trained before the checkpoint, by one that died and one that took its place, is not trained again."""
    done = run(tmp_path, SUPERVISED, dies=2, **{"await": "came", "rank 0 too": True})
    assert done.returncode == 0, done.output[-8000:]
    assert done.output.count("takes its place") == 1
    assert re.search(r"Restart 1 of 3: training goes on from step 40, the newest checkpoint of this run", done.output)
    assert done.output.count("joins this fit with") == 2
    assert len(list(tmp_path.glob("finished-*"))) == 3


def test_nobody_is_left_when_rank_0_is_killed(tmp_path: Path) -> None:
    """Neither who was there nor who is about to come."""
    with script(SCRIPT, tmp_path, env={"CASE": json.dumps({"dies": 2, "await": "never"})}) as process:
        deadline = time.monotonic() + 120.0
        output = tmp_path / "output.txt"
        while "takes its place" not in output.read_text():
            assert time.monotonic() < deadline, output.read_text()[-8000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_further_worker_joins_from_outside(tmp_path: Path) -> None:
    env = {"CASE": json.dumps({"await": "released"})}
    with script(SCRIPT, tmp_path, env=env) as process:
        output = tmp_path / "output.txt"
        deadline = time.monotonic() + 120.0
        while not (found := re.search(r"joins this fit with: python (.*)\n", output.read_text())):
            assert time.monotonic() < deadline, output.read_text()[-8000:]
            time.sleep(0.05)
        command = shlex.split(found[1])
        file = Path(command[command.index("--secret") + 1])
        assert file.stat().st_mode & 0o777 == 0o600
        wait_for_file(tmp_path / "began-1-1-0")
        environment = {**os.environ, **_environment_of(process)}

        def join(arguments: list[str]) -> subprocess.Popen[str]:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=environment, **pipes)

        wrong = tmp_path / "wrong"
        wrong.touch(mode=0o600)
        wrong.write_text("0" * 64)
        refused = join([str(wrong) if argument == str(file) else argument for argument in command])
        joined = join(command)
        assert "is not of the fit that runs at" in refused.communicate(timeout=120)[0]
        assert refused.returncode == 1
        wait_for_file(tmp_path / "came", 120.0)
        (tmp_path / "released").touch()
        text = joined.communicate(timeout=120)[0]
        assert joined.returncode == 0, text[-8000:]
        process.wait(120)
    text = output.read_text()
    assert process.returncode == 0, text[-8000:]
    assert result_of(text)["joins"] == 1
    assert len(list(tmp_path.glob("finished-*"))) == 4
    assert not file.exists()


def _environment_of(process: subprocess.Popen[str]) -> dict[str, str]:
    environment = psutil.Process(process.pid).environ()
    return {name: environment[name] for name in ("CASE", "PYTHONPATH", "OMP_NUM_THREADS", MARK)}
