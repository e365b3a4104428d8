"""What the tests start: it is spared what it does not need, and ends with the tests, also if these are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.integration.harness import PLAIN, ROOT, run_script, wait_for_file

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)  # as torchrun
Path("pids-new").write_text(f"{__import__('os').getpid()} {child.pid}")
Path("pids-new").rename("pids")
time.sleep(1000)
"""
TESTS = f"""
import sys
from pathlib import Path
from tests.integration.harness import script, workers
from tests.integration.test_harness import sleep

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with script({SCRIPT!r}, folder) as process, workers(sleep, 1, folder / "workers", folder) as group:
        process.wait()
"""


def sleep(rank: int, folder: Path) -> None:
    import os
    import time

    (folder / "worker-new").write_text(str(os.getpid()))
    (folder / "worker-new").rename(folder / "worker")
    time.sleep(1000)


def test_nothing_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    program = tmp_path / "killed.py"
    program.write_text(TESTS)
    tests = subprocess.Popen([sys.executable, program, tmp_path], env={"PYTHONPATH": str(ROOT)})
    started = []
    try:
        for name in ("pids", "worker"):
            wait_for_file(tmp_path / name)
            started += [psutil.Process(int(pid)) for pid in (tmp_path / name).read_text().split()]
        assert len(started) == 3
        tests.kill()
        tests.wait()
        assert psutil.wait_procs(started, timeout=30)[1] == []
    finally:
        tests.kill()
        for process in started:
            if process.is_running():
                process.kill()


LOADED = """
import gc, sys
from importlib.metadata import version

import lightning

print("loaded:", [name for name in ("matplotlib", "scipy", "transformers") if name in sys.modules])
print("frozen:", gc.get_freeze_count() > 100_000)
import torch
torch.use_deterministic_algorithms(False, warn_only=True)
asked = torch.is_deterministic_algorithms_warn_only_enabled(), torch._dynamo.utils.get_optimize_ddp_mode()
print("compiler:", hasattr(sys.modules["torch._dynamo"], "__file__"))
if sys.argv[1:]:
    sys.exit()
import matplotlib, scipy.signal, transformers
from lightning.fabric.wrappers import OptimizedModule
plain = torch.nn.Linear(1, 1)
assert [isinstance(module, OptimizedModule) for module in (plain, torch.compile(plain))] == [False, True]
torch.use_deterministic_algorithms(True)
told = torch._inductor.config.deterministic, torch.are_deterministic_algorithms_enabled()
print("there:", *map(version, ("matplotlib", "scipy", "transformers")), asked, told)
print("collector:", *gc.get_threshold(), gc.isenabled())
"""


def test_a_script_imports_lightning_without_what_only_some_metrics_need(tmp_path: Path) -> None:
    """And whoever asks for that has it; after the import, the garbage collector is as it always is."""
    spared, users = (
        run_script(LOADED, tmp_path / name, env=environment)
        for name, environment in (("spared", {}), ("a user's", {"PYTHONPATH": str(ROOT)}))
    )
    plain = run_script(LOADED, tmp_path / "plain", "its collector", env=PLAIN)  # for the rest it is as the spared one
    assert [script.returncode for script in (spared, users, plain)] == [0, 0, 0], [spared, users, plain]
    there = users.output.splitlines()[3:]
    assert users.output.splitlines() == [
        *("loaded: ['matplotlib', 'scipy', 'transformers']", "frozen: False", "compiler: True"),
        *there,
    ]
    assert spared.output.splitlines() == ["loaded: []", "frozen: True", "compiler: False", *there]
    assert plain.output.splitlines() == ["loaded: []", "frozen: False", "compiler: False"]
