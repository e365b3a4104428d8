"""Time per step where the exchange takes as long as a step: HPSGD beside DDP, local SGD and the step alone.

Two workers, each in a network namespace of its own, joined by a link whose rate is limited (tc tbf) so that the
all-reduce of the 1.1 M parameters takes as long as a step of the emulated accelerator. This needs ip and tc, and root
or the right to make user namespaces (unshare).
Local SGD is Lightning's own, which averages every 4 steps. The emulated step is the best case for DDP: the layer that
sleeps is the first one, so that in two thirds of the step all gradients are there and the all-reduce runs beside it.

    python benchmarks/overlap.py [--repetitions 5] [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from emulated import Emulated, LocalSGD, milliseconds_per_step, quiet
from report import Row, report
from rich.progress import track

from lightning_stale import HPSGDStrategy

STEP_S = 0.040
CASES = {
    "step alone": None,
    "ddp": "ddp",
    "local SGD": LocalSGD,
    "hpsgd": HPSGDStrategy,
    "hpsgd, merge='cocod'": lambda: HPSGDStrategy(merge="cocod"),
}
FIRST_RATE_MBIT = 1_000
IP, TC = shutil.which("ip") or "", shutil.which("tc") or ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def run_as_root() -> int:
    """Run this script as root of a user namespace, with networks and a /run of its own; return its exit status."""
    unshare = shutil.which("unshare") or ""
    alone = [unshare, "--user", "--map-root-user", "--net", "--mount", "--propagation", "private"]
    if not unshare or subprocess.run([*alone, "true"], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        print("Skipped: an emulated slow network needs root, or user namespaces (unshare --user).")
        return 0
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    return subprocess.run([*alone, "sh", "-c", script, "sh", sys.executable, *sys.argv], check=False).returncode


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a link."""
    names = (f"stale{os.getpid()}a", f"stale{os.getpid()}b")
    try:
        for name in names:
            _run(IP, "netns", "add", name)
        _run(IP, "link", "add", "stale0", "netns", names[0], "type", "veth", "peer", "stale0", "netns", names[1])
        for i, name in enumerate(names):
            _run(IP, "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "stale0")
            for device in ("lo", "stale0"):
                _run(IP, "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run([IP, "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def limit_rate(names: tuple[str, str], mbit: float) -> None:
    """Let each direction of the link carry ``mbit`` megabits per second."""
    for name in names:
        qdisc = [TC, "-n", name, "qdisc", "replace", "dev", "stale0", "root", "tbf"]
        _run(*qdisc, "rate", f"{mbit:.0f}mbit", "burst", "256kb", "latency", "100ms")


def run_both(names: tuple[str, str], *arguments: str) -> list:
    """Run this script in both namespaces; return what rank 0 has written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        processes = []
        for rank, name in enumerate(names):
            environment = {
                **os.environ,
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29500",
                "NODE_RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "GLOO_SOCKET_IFNAME": "stale0",
                "OMP_NUM_THREADS": "1",
            }
            command = [IP, "netns", "exec", name, sys.executable, __file__, "--rank", str(rank), "--json", str(path)]
            processes.append(subprocess.Popen([*command, *arguments], env=environment))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"a worker has failed: exit codes {codes}")
        return json.loads(path.read_text())


def _calibrate() -> list[float]:
    """Return the seconds of the all-reduce of one gradient, as it is now."""
    dist.init_process_group("gloo", rank=int(os.environ["NODE_RANK"]), world_size=2)
    flat = torch.zeros(sum(parameter.numel() for parameter in Emulated(0.0).parameters()))
    times = []
    for _ in range(15):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(flat)
        times.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return [statistics.median(times[5:])]


def _measure(rank: int, repetitions: int, steps: int) -> list[tuple[str, float]]:
    quiet()
    rounds = [name for _ in range(repetitions) for name in CASES]
    results = []
    for name in track(rounds, description="2 workers") if rank == 0 else rounds:
        os.environ["WORLD_SIZE"] = "2"
        strategy = CASES[name]
        if strategy is None:
            del os.environ["WORLD_SIZE"]
            results.append((name, milliseconds_per_step("auto", steps, STEP_S, 1)))
        else:
            chosen = strategy if isinstance(strategy, str) else strategy()
            results.append((name, milliseconds_per_step(chosen, steps, STEP_S, 1, num_nodes=2)))
    return results


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank >= 0:
        measured = (
            _calibrate() if arguments.calibrate else _measure(arguments.rank, arguments.repetitions, arguments.steps)
        )
        if arguments.rank == 0:
            arguments.json.write_text(json.dumps(measured))
        return
    if not IP or not TC:
        print("Skipped: an emulated slow network needs ip and tc (Debian: iproute2).")
        return
    if os.geteuid() != 0:
        sys.exit(run_as_root())
    with namespaces() as names:
        mbit, exchange_s = float(FIRST_RATE_MBIT), 0.0
        for _ in range(3):
            limit_rate(names, mbit)
            exchange_s = run_both(names, "--calibrate")[0]
            if abs(exchange_s / STEP_S - 1) < 0.1:
                break
            mbit *= exchange_s / STEP_S
        print(f"{mbit:.0f} Mbit/s: an all-reduce takes {1e3 * exchange_s:.0f} ms, a step {1e3 * STEP_S:.0f} ms")
        options = ("--repetitions", str(arguments.repetitions), "--steps", str(arguments.steps))
        measured = run_both(names, *options)
    rows = [
        Row(name, [ms for n, ms in measured if n == name], None if name == "step alone" else "step alone")
        for name in CASES
    ]
    for row in rows:
        row.expected = "<= 1.05" if row.name.startswith("hpsgd") else ""
    title = f"An exchange of {1e3 * exchange_s:.0f} ms beside a step of {1e3 * STEP_S:.0f} ms, 2 workers"
    report("overlap", title, "ms per step", rows)


if __name__ == "__main__":
    main()
