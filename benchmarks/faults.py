"""A soak: faults into running fits, after which every sample has been trained exactly as often as there were epochs.

    python benchmarks/faults.py --faults 20 --seed 1 --paradigms asp bounded-delay

Each run is a script of real processes under ``python -m lightning_stale run``, which brings it back from its newest
checkpoint when a fault ends it. The loss is linear: the gradient of a sample is one in its own entry of ``pages``, and
its number in ``sum``, all of them integers in float64. So the weights tell exactly what has been applied to them, and
the optimizer, in the server, keeps a record of its own, which travels with its state. At the end both are compared with
what must be: each sample once per epoch, nothing lost, nothing doubled. Same seed, same faults; when they come, the
machine decides.

It ends with exit code 1 if anything was lost or doubled, hung, failed or was left, or if a run has ended that should
have borne a fault: one that was stopped for a moment, strangers at its port, or with ``--elastic`` the loss of a worker
but rank 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
MARK = "LIGHTNING_STALE_FAULTS"
"""An environment variable that every process of a run inherits."""
SAMPLES, BATCH, STEP_S = 64, 2, 0.01
PARADIGMS = ("bsp", "asp", "ssp", "dssp", "bounded-delay", "hpsgd")
AVERAGING = ("bsp", "hpsgd")
PATIENCE_S = 5.0
"""Of an elastic run."""
HEARTBEATS_S = 20.0
"""What counts without elasticity."""
HANG_S = 180.0
"""Nobody takes a step for so long: imports on a busy machine are the slowest that is sound."""
LEFT_S = 20.0


# --- what is trained --------------------------------------------------------------------------------------------------


def train(folder: Path, options: dict[str, Any]) -> None:
    """Train until ``folder`` has a file ``enough``; save weights, the optimizer's record and the number of epochs."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_stale

    class Recording(torch.optim.SGD):
        """Keeps the sum of all gradients that it has taken."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        state = self.state[parameter]
                        state.setdefault("taken", torch.zeros_like(parameter)).add_(parameter.grad)
            return super().step(closure)

    class Pages(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.pages = torch.nn.Parameter(torch.zeros(SAMPLES, dtype=torch.float64))
            self.sum = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(STEP_S)
            (folder / f"worker-{os.getpid()}").write_text(str(self.global_rank))
            return self.pages[batch[0]].sum() + self.sum[0] * (batch[0] + 1).sum()

        def configure_optimizers(self) -> Any:
            return Recording(self.parameters(), lr=1.0)

    class Enough(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.strategy.broadcast((folder / "enough").exists())

    name = options["paradigm"]
    if name == "hpsgd":
        strategy: Any = lightning_stale.HPSGDStrategy(interval=2)
        saves = ModelCheckpoint(folder)
    else:
        elastic = {}
        if options["elastic"]:
            from lightning_stale.elastic import Elastic

            elastic["elastic"] = Elastic(min_workers=1, max_restarts=1_000_000, patience_s=PATIENCE_S)
        strategy = lightning_stale.StaleSyncStrategy(
            paradigm=name, data="on-demand", transport=options["transport"], **elastic
        )
        saves = ModelCheckpoint(folder, every_n_train_steps=5)
    if options["transport"] == "tcp":
        connect_through_a_proxy(folder)
    model = Pages()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options["workers"],
        strategy=strategy,
        max_epochs=-1,
        callbacks=[saves, Enough()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True))
    if trainer.is_global_zero:
        taken = [trainer.optimizers[0].state[parameter].get("taken") for parameter in model.parameters()]
        end = {
            "epochs": trainer.current_epoch,
            "pages": model.pages.tolist(),
            "sum": model.sum.item(),
            "taken": None if name == "hpsgd" else [one.tolist() for one in taken],
            "summary": {k: v for k, v in trainer.strategy.summary().items() if isinstance(v, int)},
        }
        (folder / "end.json").write_text(json.dumps(end))


def connect_through_a_proxy(folder: Path) -> None:
    """Let this worker reach the server through a thread of its own, which can drop its connections."""
    from dataclasses import replace

    from lightning_stale.strategies.updates import server

    plain = server.ParameterClient

    def client(endpoint: Any, *args: Any, **kwargs: Any) -> Any:
        host, _, port = endpoint.address.removeprefix("tcp://").rpartition(":")
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_relay, args=(listener, (host, int(port)), folder), daemon=True).start()
        return plain(replace(endpoint, address=f"tcp://127.0.0.1:{listener.getsockname()[1]}"), *args, **kwargs)

    server.ParameterClient = client  # type: ignore[assignment,misc]


def _relay(listener: socket.socket, server: tuple[str, int], folder: Path) -> None:
    while True:
        worker, _ = listener.accept()
        ends = (worker, socket.create_connection(server))
        for one, other in (ends, ends[::-1]):
            threading.Thread(target=_pump, args=(one, other), daemon=True).start()
        threading.Thread(target=_drop_when_told, args=(ends, folder / f"drop-{os.getpid()}"), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _drop_when_told(ends: tuple[socket.socket, socket.socket], told: Path) -> None:
    while not told.exists():
        time.sleep(0.02)
    told.unlink(missing_ok=True)
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


# --- a run, from outside ----------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """One that was injected."""

    kind: str
    victim: str
    went_on: bool
    """And was not started anew."""
    bearable: bool = False
    """It should have gone on."""


@dataclass
class Outcome:
    """How one run has ended."""

    paradigm: str
    transport: str
    faults: list[Fault] = field(default_factory=list)
    epochs: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: str = ""
    """What the weights are not."""
    hung: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        ended = any(fault.bearable and not fault.went_on for fault in self.faults)
        return not (self.lost or self.doubled or self.wrong or self.hung or self.left or ended)


class HungError(Exception):
    """Nobody gets on."""


class Run:
    """One fit, under its supervisor.

    Args:
        folder: its own.
        options: of :func:`train`.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.patience_s = PATIENCE_S if options["elastic"] else HEARTBEATS_S
        self._output = (folder / "output.txt").open("w")
        command = [sys.executable, "-m", "lightning_stale", "run", "--max-restarts", "1000000", __file__]
        self._process = subprocess.Popen(
            [*command, "--train", str(folder), json.dumps(options)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    @property
    def restarts(self) -> int:
        """How often the supervisor has started it anew."""
        return (self.folder / "output.txt").read_text(errors="replace").count("; restart ")

    def processes(self) -> Iterator[psutil.Process]:
        """Those that live."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    yield process

    def workers(self) -> dict[int, str]:
        """Return the process id of each worker that has trained a batch and lives, with its rank."""
        living = {process.pid for process in self.processes()}
        found = {int(path.name.partition("-")[2]): path.read_text() for path in self.folder.glob("worker-*")}
        return {pid: rank for pid, rank in found.items() if pid in living and rank}

    def server(self) -> psutil.Process | None:
        """Return the server's process, of ``hpsgd`` the coordinator's."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if {"lightning_stale.parameter_server", "lightning_stale.coordinator"} & set(process.cmdline()):
                    return process
        return None

    def await_progress(self, workers: int) -> None:
        """Wait until so many workers have trained a batch from now on.

        Raises:
            HungError: if they do not.
        """
        since = time.time()
        deadline = time.monotonic() + HANG_S
        while True:
            fresh = [pid for pid in self.workers() if self._modified(pid) > since]
            if len(fresh) >= workers:
                return
            if self._process.poll() is not None:
                raise HungError(f"it has ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise HungError(f"{len(fresh)} of {workers} workers take steps")
            time.sleep(0.05)

    def finish(self) -> dict[str, Any]:
        """Let it end with its epoch, and return what it has saved.

        Raises:
            HungError: if it does not end, or fails.
        """
        (self.folder / "enough").touch()
        try:
            code = self._process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise HungError("it does not end") from None
        if code:
            raise HungError(f"it has ended with {code}")
        end: dict[str, Any] = json.loads((self.folder / "end.json").read_text())
        return end

    def left(self) -> list[str]:
        """Return what is left of it after a while."""
        deadline = time.monotonic() + LEFT_S
        while True:
            processes = list(self.processes())
            files = [str(path) for path in Path("/dev/shm").glob("lightning-stale-*")]  # noqa: S108
            if not processes and not files:
                return []
            if time.monotonic() > deadline:
                return [f"{process.pid} {' '.join(process.cmdline())}" for process in processes] + files
            time.sleep(0.1)

    def end(self) -> None:
        """Kill what lives."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._output.close()

    def _modified(self, pid: int) -> float:
        with contextlib.suppress(OSError):
            return (self.folder / f"worker-{pid}").stat().st_mtime
        return 0.0


# --- faults -----------------------------------------------------------------------------------------------------------

KINDS = ("kill", "segv", "pause", "hang", "drop", "shm", "garbage")


def inject(kind: str, run: Run, rng: random.Random) -> str:
    """Do it to a random victim; return which, or ``""`` if there is none."""
    ranks, server = run.workers(), run.server()
    candidates = [*sorted(ranks, key=lambda pid: ranks[pid]), *([server.pid] if server is not None else [])]
    if not candidates:
        return ""
    pid = rng.choice(candidates)
    victim = f"rank {ranks[pid]}" if pid in ranks else "server"
    with contextlib.suppress(ProcessLookupError, psutil.Error, OSError):
        match kind:
            case "kill":
                os.kill(pid, signal.SIGKILL)
            case "segv":
                os.kill(pid, signal.SIGSEGV)
            case "pause" | "hang":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0.1, 2.0) if kind == "pause" else run.patience_s + 10.0)
                os.kill(pid, signal.SIGCONT)
            case "drop":
                pid, rank = rng.choice(sorted(ranks.items()))
                victim = f"rank {rank}"
                (run.folder / f"drop-{pid}").touch()
            case "shm":
                os.kill(pid, signal.SIGKILL)
                victim = f"{victim}, and no room for the next server" if _leave_no_room(run, server) else victim
            case "garbage":
                victim = "server"
                if server is not None:
                    _send_garbage(server, rng)
    return victim


def is_bearable(kind: str, victim: str, elastic: bool) -> bool:
    """Whether a run goes on after such a fault: one that is short, or hits a worker of an elastic run but rank 0."""
    return kind in ("pause", "garbage") or (elastic and victim.startswith("rank ") and not victim.startswith("rank 0"))


def _leave_no_room(run: Run, before: psutil.Process | None) -> bool:
    """Let the next server have no room for shared memory, by its own limit: the machine's folder is everybody's."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        server = run.server()
        if server is not None and server != before:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (64, 64))
            return True
        time.sleep(0.02)
    return False


def _send_garbage(server: psutil.Process, rng: random.Random) -> None:
    ports = [c.laddr.port for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(48)
    what = rng.choice(
        [rng.randbytes(1000), b"GET / HTTP/1.1\r\n\r\n", greeting, greeting + rng.randbytes(100_000), b""]
    )
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as stranger:
            stranger.sendall(what)
            time.sleep(0.1)


# --- the soak ---------------------------------------------------------------------------------------------------------


def soak(paradigm: str, kinds: list[str], rng: random.Random, workers: int, elastic: bool, folder: Path) -> Outcome:
    """Run a fit through faults of ``kinds``, and see what has become of it."""
    transport = "tcp" if "drop" in kinds else "auto"
    run = Run(folder, {"paradigm": paradigm, "transport": transport, "workers": workers, "elastic": elastic})
    outcome = Outcome(paradigm, transport)
    try:
        for kind in kinds:
            run.await_progress(workers)
            time.sleep(rng.uniform(0.0, 1.0))
            before = run.restarts
            victim = inject(kind, run, rng)
            run.await_progress(workers)
            fault = Fault(kind, victim, run.restarts == before, is_bearable(kind, victim, elastic))
            outcome.faults.append(fault)
            _say(f"{paradigm:14} {kind:8} {victim:20} restarts {run.restarts}")
        check(run.finish(), outcome, workers, elastic)
        outcome.left = run.left()
    except HungError as error:
        outcome.hung = f"{kinds[: len(outcome.faults) + 1]}: {error}; see {folder}/output.txt"
    finally:
        run.end()
    return outcome


def check(end: dict[str, Any], outcome: Outcome, workers: int, elastic: bool) -> None:
    """Compare the weights and the optimizer's record with each sample once per epoch."""
    pages = end["pages"]
    mean = workers if outcome.paradigm in AVERAGING else 1
    outcome.epochs = end["epochs"]
    taken = [-page for page in pages] if end["taken"] is None else end["taken"][0]
    if [-page for page in pages] != taken:
        outcome.wrong = "the weights are not what the optimizer has taken"
    if end["sum"] != sum((sample + 1) * page for sample, page in enumerate(pages)):
        outcome.wrong = "the weights of a batch were applied in part"
    if elastic and outcome.paradigm == "bsp":  # the mean is one of those present, whose number changes
        outcome.lost = sum(one * workers < outcome.epochs for one in taken)
        return
    for one in taken:
        count = one * mean
        outcome.lost += max(0, round(outcome.epochs - count))
        outcome.doubled += max(0, round(count - outcome.epochs))
        if count != round(count):
            outcome.wrong = f"a sample was trained {count} times"


def report(outcomes: list[Outcome], seed: int, elastic: bool) -> None:
    """Print a table, and write ``results/faults.json``."""
    from rich.console import Console
    from rich.table import Table

    faults = [fault for outcome in outcomes for fault in outcome.faults]
    by_kind = {
        kind: {
            "injected": sum(fault.kind == kind for fault in faults),
            "went on": sum(fault.kind == kind and fault.went_on for fault in faults),
            "started anew": sum(fault.kind == kind and not fault.went_on for fault in faults),
        }
        for kind in KINDS
    }
    total = {
        "faults": len(faults),
        "runs": len(outcomes),
        "epochs": sum(outcome.epochs for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "doubled": sum(outcome.doubled for outcome in outcomes),
        "wrong": sum(bool(outcome.wrong) for outcome in outcomes),
        "ended": sum(fault.bearable and not fault.went_on for fault in faults),
        "hangs": sum(bool(outcome.hung) for outcome in outcomes),
        "leftovers": sum(len(outcome.left) for outcome in outcomes),
    }
    table = Table(title=f"faults, seed {seed}{', elastic' if elastic else ''}")
    for heading in ("kind", "injected", "went on", "started anew"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, counts in by_kind.items():
        table.add_row(kind, *map(str, counts.values()))
    console = Console(width=100)
    console.print(table)
    console.print(", ".join(f"{name} {count}" for name, count in total.items()))
    for outcome in outcomes:
        if not outcome.sound:
            console.print(outcome)
    RESULTS.mkdir(exist_ok=True)
    content = {"seed": seed, "elastic": elastic, "total": total, "kinds": by_kind}
    content["runs"] = [asdict(outcome) for outcome in outcomes]
    (RESULTS / "faults.json").write_text(json.dumps(content, indent=2) + "\n")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def plan(faults: int, rng: random.Random, paradigms: list[str], kinds: list[str], each: int) -> list[tuple[str, Any]]:
    """Return the runs: the paradigm of each, and its faults; connections that can be dropped are TCP, others memory."""
    runs = []
    while faults > 0:
        paradigm = paradigms[len(runs) % len(paradigms)]
        possible = [kind for kind in kinds if kind != "drop" and not (kind == "shm" and paradigm == "hpsgd")]
        if "drop" in kinds and paradigm != "hpsgd" and rng.random() < 0.5:
            possible = [kind for kind in kinds if kind != "shm"]
        runs.append((paradigm, [rng.choice(possible) for _ in range(min(each, faults))]))
        faults -= each
    return runs


def main() -> None:
    """Inject, and report."""
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paradigms", nargs="+", choices=PARADIGMS, default=list(PARADIGMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--workers", type=int, default=2, help="a power of two, so that means are exact")
    parser.add_argument("--each", type=int, default=10, help="faults per run")
    parser.add_argument("--elastic", action="store_true")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.workers & (arguments.workers - 1):
        parser.error(f"--workers {arguments.workers}: write a power of two, so that means are exact")
    rng = random.Random(arguments.seed)
    paradigms = [name for name in arguments.paradigms if not (arguments.elastic and name == "hpsgd")]
    outcomes = []
    name = tempfile.mkdtemp(prefix="lightning-stale-faults-")
    runs = plan(arguments.faults, rng, paradigms, arguments.kinds, arguments.each)
    for number, (paradigm, kinds) in enumerate(runs):
        folder = Path(name) / str(number)
        folder.mkdir()
        outcomes.append(soak(paradigm, kinds, rng, arguments.workers, arguments.elastic, folder))
    report(outcomes, arguments.seed, arguments.elastic)
    if not all(outcome.sound for outcome in outcomes):
        sys.exit(1)
    shutil.rmtree(name)  # and keep what has gone wrong


if __name__ == "__main__":
    main()
