"""A command is run again when it fails, and nothing of an attempt is left when the next begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = [sys.executable, "-X", "lightning_stale_server", "-m", "lightning_stale.supervisor"]

SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
attempts = Path("attempts")
number = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (number + 1))
"""


def supervise(folder: Path, code: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT + code)
    return subprocess.Popen(
        [*LIGHT, *options, "script.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, code: str, *options: str, arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
    with supervise(folder, code, *options, arguments=arguments) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def attempts(folder: Path) -> int:
    return len((folder / "attempts").read_text())


def test_what_succeeds_is_run_once_with_its_arguments(tmp_path: Path) -> None:
    code, output, errors = run(tmp_path, "print(sys.argv[1:])", arguments=("--max-restarts", "x", "-m"))
    assert (code, output, errors) == (0, "['--max-restarts', 'x', '-m']\n", "")
    assert attempts(tmp_path) == 1


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    assert run(tmp_path, "print(__spec__.name)")[0] == 1  # a script has none
    process = subprocess.run(
        [*LIGHT, "-m", "script"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout == "script\n", process.stderr


def test_the_interpreters_options_are_those_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; print(sys.flags.utf8_mode, sys._xoptions)")
    command = [LIGHT[0], "-X", "utf8", *LIGHT[1:], "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.stdout == "1 {'utf8': True}\n", process.stderr


def test_what_fails_is_run_as_often_as_said(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, "sys.exit(3)", "--max-restarts", "2")
    assert code == 3
    assert attempts(tmp_path) == 3
    assert errors.splitlines() == [
        "lightning_stale: script.py ended with exit code 3; restart 1 of 2",
        "lightning_stale: script.py ended with exit code 3; restart 2 of 2",
        "lightning_stale: script.py ended with exit code 3; no more",
    ]


def test_what_was_killed_is_run_again_and_knows_which_restart_it_is(tmp_path: Path) -> None:
    code, output, errors = run(
        tmp_path,
        "print(os.environ['LIGHTNING_STALE_RESTART'], flush=True)\nif number == 0: os.kill(os.getpid(), 9)",
    )
    assert (code, output) == (0, "0/3\n1/3\n")
    assert "was killed by SIGKILL; restart 1 of 3" in errors


def test_all_attempts_have_one_folder_which_is_gone_afterwards(tmp_path: Path) -> None:
    _, output, _ = run(
        tmp_path,
        "folder = os.environ['LIGHTNING_STALE_SUPERVISOR'].split()[1]\nprint(folder, oct(os.stat(folder).st_mode), "
        "flush=True)\nsys.exit(number == 0)",
    )
    first, second = output.splitlines()
    assert first == second
    assert first.endswith("700")
    assert not Path(first.split()[0]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="orphans come to the supervisor on Linux")
def test_what_an_attempt_leaves_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM, and its child; the supervisor's patience is shortened."""
    orphan = "import subprocess, sys, time; subprocess.Popen(['sleep', '3600']); time.sleep(3600)"
    code = f"""
if number == 0:
    child = subprocess.Popen([sys.executable, "-c", {orphan!r}])
    Path("orphan").write_text(str(child.pid))
    sys.exit(1)
print(Path("/proc", Path("orphan").read_text()).exists())
"""
    (tmp_path / "script.py").write_text(SCRIPT + code)
    impatient = (
        "import sys; from lightning_stale import supervisor; supervisor._ORPHANS_S = 0.5; "
        f"print(supervisor.Supervisor([{sys.executable!r}, 'script.py'], 1, 'script.py').run(), flush=True); "
        "print(supervisor._children_of(supervisor.os.getpid()))"
    )
    process = subprocess.run(
        [sys.executable, "-X", "lightning_stale_server", "-c", impatient],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout == "False\n0\n[]\n", process.stderr


def test_a_signal_is_passed_on_and_ends_it_for_good(tmp_path: Path) -> None:
    code = """
def end(number, frame):
    print("told", flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(3600)
"""
    with supervise(tmp_path, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output, attempts(tmp_path)) == (5, "told\n", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells on Linux")
def test_a_killed_supervisor_takes_its_command_along(tmp_path: Path) -> None:
    with supervise(tmp_path, "print(os.getpid(), flush=True)\ntime.sleep(3600)") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.communicate(timeout=60)  # the end of its output is the command's end too
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("count", ["-1", "many"])
def test_a_wrong_number_of_restarts_is_refused(count: str, tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, "", f"--max-restarts={count}")
    assert code == 2
    assert f"{count!r}: write a number of restarts >= 0, e.g. --max-restarts 3" in errors


def test_the_commands_usage_is_shown() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "lightning_stale_server", "-m", "lightning_stale"]
    process = subprocess.run([*command, "rub"], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert "usage: python -m lightning_stale" in process.stderr
    assert "invalid choice: 'rub' (choose from 'run'" in process.stderr
