"""How the processes of a run end says how it went; a thread that outlived the interpreter would make it 134."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import PLAIN, run_script, script, wait_for_file

LR_FIND = """
from lightning.pytorch.tuner import Tuner

from lightning_stale import DSPStrategy
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches

model = Chain(lr=0.01)
t = trainer(2, DSPStrategy(split=[3]), max_epochs=1, enable_checkpointing=True)
Tuner(t).lr_find(model, batches(60), num_training=20)
t.validate(model, batches(3), verbose=False)
"""

FAULT = """
from lightning_stale import DSPStrategy
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches

class Faulty(Chain):
    def training_step(self, batch, batch_idx):
        if batch_idx == 10 and self.global_rank == 1:
            raise ValueError("a fault")
        return super().training_step(batch, batch_idx)

trainer(2, DSPStrategy(split=[3]), max_epochs=1).fit(Faulty(), batches(60))
"""


@pytest.mark.parametrize(("code", "returncode"), [(LR_FIND, 0), (FAULT, 1)], ids=["lr_find", "exception"])
def test_no_rank_is_aborted(code: str, returncode: int, tmp_path: Path) -> None:
    ended = run_script(code, tmp_path, env=PLAIN)
    assert ended.returncode == returncode, ended.output
    assert "terminate called" not in ended.output


APP = """
import time
from pathlib import Path

import hydra
from lightning_stale import HPSGDStrategy
from tests.integration.models import Regression, loader, trainer
from tests.unit.pipeline.networks import Chain, batches

def slowly(base):
    class Slow(base):
        def training_step(self, batch, batch_idx):
            if batch_idx >= 5:
                Path(f"under-way-{self.global_rank}").touch()
                if self.global_rank == 0:  # rank 1 waits for it, in a sum that this one never begins
                    time.sleep(1.0)
            return super().training_step(batch, batch_idx)
    return Slow

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    strategy = HPSGDStrategy(interval=1) if config.strategy == "hpsgd" else config.strategy
    dsp = config.strategy == "dsp"
    model, data = (slowly(Chain)(), batches(50)) if dsp else (slowly(Regression)(), loader())
    trainer(2, strategy, max_epochs=-1).fit(model, data)

main()
"""


@pytest.mark.parametrize(
    ("strategy", "to", "said"),
    [("hpsgd", "group", "rank 0 "), ("dsp", "rank 1", "rank 1 "), ("bsp", "rank 0", "rank 0 ")],
)
def test_sigterm_is_named_on_the_console_and_in_the_log(strategy: str, to: str, said: str, tmp_path: Path) -> None:
    """In a Hydra job, whose rank 0 waits for the others, and kills those that do not end."""
    with script(APP, tmp_path, f"+strategy={strategy}", "hydra.run.dir=job") as process:
        for rank in range(2):
            wait_for_file(tmp_path / f"under-way-{rank}")
        (child,) = (p for p in psutil.Process(process.pid).children() if p.environ().get("LOCAL_RANK") == "1")
        if to == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill({"rank 0": process.pid, "rank 1": child.pid}[to], signal.SIGTERM)
        process.wait(60)
    output, log = (tmp_path / "output.txt").read_text(), (tmp_path / "job" / "script.log").read_text()
    for text in (output, log):
        (line,) = [line for line in text.splitlines() if "received SIGTERM" in line]
        assert f"{said}received SIGTERM: the run ends" in line
    assert "it is killed" not in output
    assert "Traceback" not in output
