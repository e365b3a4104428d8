"""Steps per second of four workers, beside DDP in the same run and in the same processes.

A step takes 20 ms of an emulated accelerator: a layer that sleeps 7 ms in the forward and 13 ms in the backward pass.
So four workers run in parallel on two cores, while 1.1 M parameters, messages, copies, the optimizer and Lightning
stay real. First all workers are equal, then rank 0 is 2.3 times slower. Local SGD is Lightning's own (PostLocalSGD,
which averages the models every 4 steps).

    python benchmarks/workers.py [--repetitions 5] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from report import Row, report
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader, TensorDataset

FORWARD_S, BACKWARD_S = 0.007, 0.013
WORKERS, SLOW_FACTOR, BATCH, WARM_UP = 4, 2.3, 8, 10
STRATEGIES = ("ddp", "local SGD", "bsp", "ssp", "dssp", "asp")


class _Sleep(torch.autograd.Function):
    """Takes the time of an accelerator's forward and backward pass, and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        time.sleep(FORWARD_S * factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD_S * ctx.factor)
        return gradient, None


class Emulated(L.LightningModule):
    """1.1 M parameters behind an emulated accelerator."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.slow = slow
        self.net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        factor = SLOW_FACTOR if self.slow and self.global_rank == 0 else 1.0
        return nn.functional.cross_entropy(self.net(_Sleep.apply(batch[0].requires_grad_(), factor)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class LocalSGD(DDPStrategy):
    """Lightning's post-local SGD; its DDPStrategy registers the hook on CUDA only."""

    def __init__(self) -> None:
        super().__init__(model_averaging_period=4)

    def _register_ddp_hooks(self) -> None:
        group = torch.distributed.group.WORLD
        self._ddp_comm_state = PostLocalSGDState(group, subgroup=_alone(), start_localSGD_iter=WARM_UP)
        self.model.register_comm_hook(self._ddp_comm_state, post_localSGD_hook)


_GROUPS: list[Any] = []


def _alone() -> Any:
    """Return a group of this rank only."""
    if not _GROUPS:
        _GROUPS.extend(torch.distributed.new_group([rank]) for rank in range(torch.distributed.get_world_size()))
    return _GROUPS[torch.distributed.get_rank()]


class Timer(L.Callback):
    """Times the steps after the warm-up."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.steps = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step == WARM_UP:
            self.started = now
        self.ended, self.steps = now, trainer.global_step - WARM_UP


def measure(name: str, steps: int, slow: bool, workers: int) -> list[float]:
    """Return the milliseconds per step of each worker."""
    samples = BATCH * (steps + WARM_UP) * workers
    data = TensorDataset(torch.randn(samples, 512), torch.zeros(samples).long())
    timer = Timer()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=LocalSGD() if name == "local SGD" else name,
        max_steps=steps + WARM_UP,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Emulated(slow), DataLoader(data, batch_size=BATCH))
    mine = torch.tensor(1e3 * (timer.ended - timer.started) / timer.steps)
    return trainer.strategy.all_gather(mine).tolist() if workers > 1 else [float(mine)]


def _run(arguments: argparse.Namespace) -> None:
    """In every worker process: all strategies, in turn, ``repetitions`` times."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    names = ["auto"] if arguments.workers == 1 else STRATEGIES
    cases = [(slow, name) for slow in ((False,) if arguments.workers == 1 else (False, True)) for name in names]
    rounds = [case for _ in range(arguments.repetitions) for case in cases]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        rounds = track(rounds, description=f"{arguments.workers} worker(s)")
    results = [(slow, name, measure(name, arguments.steps, slow, arguments.workers)) for slow, name in rounds]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(arguments.json).write_text(json.dumps(results))


def _launch(workers: int, arguments: argparse.Namespace) -> list[tuple[bool, str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, __file__, "--workers", str(workers), "--json", str(path)]
        command += ["--repetitions", str(arguments.repetitions), "--steps", str(arguments.steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(path.read_text())


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers:
        _run(arguments)
        return
    alone = [times[0] for _, _, times in _launch(1, arguments)]
    together = _launch(WORKERS, arguments)

    def rate(slow: bool, name: str, ranks: slice) -> list[float]:
        """Samples (or steps, for equal workers) per second, a value per repetition: the sum of the workers' rates."""
        return [sum(1e3 / t for t in times[ranks]) for s, n, times in together if (s, n) == (slow, name)]

    equal = [Row("one worker alone, times 4 (limit)", [WORKERS * 1e3 / t for t in alone], "ddp")]
    equal += [Row(n, rate(False, n, slice(None)), None if n == "ddp" else "ddp") for n in STRATEGIES]
    for row in equal:
        row.expected = ">= 1.4" if row.name in ("ssp", "dssp", "asp") else ""
    report("workers_equal", f"{WORKERS} equal workers, 20 ms a step: all their steps", "steps/s", equal)

    limit = [(WORKERS - 1 + 1 / SLOW_FACTOR) * 1e3 / t for t in alone]
    unequal = [Row("sum of the workers' own rates (limit)", limit, "ddp")]
    unequal += [Row(n, rate(True, n, slice(None)), None if n == "ddp" else "ddp") for n in STRATEGIES]
    own = "a fast worker alone"
    unequal += [Row(own, [1e3 / t for t in alone])]
    unequal += [
        Row("asp: a fast worker", [r / (WORKERS - 1) for r in rate(True, "asp", slice(1, None))], own, ">= 0.9")
    ]
    report("workers_unequal", f"{WORKERS} workers, one {SLOW_FACTOR} times slower: all their steps", "steps/s", unequal)


if __name__ == "__main__":
    main()
