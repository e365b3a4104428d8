"""Batches per second of a pipeline of four stages, beside torch's own pipelining schedules in the same run.

A stage takes 20 ms for the forward and 40 ms for the backward of a batch (layers that sleep, so that four stages run in
parallel on two cores; messages, copies, threads and Lightning are real). The limit is one stage that is always busy:
1.0 without recomputation, 0.75 with, since then it runs the forward twice. DSP runs through the Trainer; GPipe and 1F1B
(torch.distributed.pipelining, 8 microbatches) in a bare loop. Then each stage doubles its time with probability 1/3.

    python benchmarks/pipeline.py [--repetitions 5] [--batches 30]
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from emulated import batches_per_second, quiet
from report import Row, report
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy

FORWARD_S, BACKWARD_S = 0.020, 0.040
STAGES, MICROBATCHES, BATCH, WIDTH, WARM_UP = 4, 8, 16, 256, 12
LIMIT = 1 / (FORWARD_S + BACKWARD_S)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SleepingLayer) -> Tensor:
        ctx.layer = layer
        time.sleep(FORWARD_S * layer.factor() * len(x) / BATCH)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD_S * ctx.layer.factor() * len(gradient) / BATCH)
        return gradient, None


class SleepingLayer(nn.Module):
    """Takes the time of an accelerator, and no core; doubles it with ``probability``."""

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self.probability, self.random = probability, random.Random(seed)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def factor(self) -> float:
        return 2.0 if self.random.random() < self.probability else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(self.linear(x), self)


class Model(L.LightningModule):
    """Four sleeping layers, one per stage."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.net = nn.Sequential(*(SleepingLayer(probability, seed=k) for k in range(STAGES)))
        self.marks: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.marks.append(time.perf_counter())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def dsp(batches: int, probability: float, **options: Any) -> float:
    """Return batches per second through the Trainer, between the warm-up and the last."""
    same = torch.Generator().manual_seed(0)  # on all ranks
    data = TensorDataset(*torch.randn(2, BATCH * (batches + WARM_UP), WIDTH, generator=same))
    strategy = DSPStrategy(process_group_backend="gloo", **options)
    return batches_per_second(Model(probability), DataLoader(data, batch_size=BATCH), STAGES, strategy, WARM_UP)


def peer(schedule_class: Any, batches: int, probability: float) -> float:
    """Return batches per second of one of torch's schedules."""
    rank = dist.get_rank()
    stage_index = rank
    block = SleepingLayer(probability, seed=stage_index)
    stage = PipelineStage(block, stage_index, STAGES, torch.device("cpu"))
    schedule = schedule_class(stage, n_microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    x, y = torch.randn(2, BATCH, WIDTH)
    warm_up = 3
    for batch in range(batches + warm_up):
        if batch == warm_up:
            dist.barrier()
            started = time.perf_counter()
        if stage_index == 0:
            schedule.step(x)
        elif stage_index == STAGES - 1:
            schedule.step(target=y, losses=[])
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    return batches / (time.perf_counter() - started)


CASES = {
    "GPipe, 8 microbatches": lambda n, p: peer(ScheduleGPipe, n, p),
    "1F1B, 8 microbatches": lambda n, p: peer(Schedule1F1B, n, p),
    "DSP, m = 2(K-1-k)": lambda n, p: dsp(n, p),
    "DSP, m = 2(K-1-k), no recompute": lambda n, p: dsp(n, p, recompute=False),
    "DSP, m = K-1-k, no recompute": lambda n, p: dsp(n, p, staleness="minimal", recompute=False),
    "back-propagation, m = 0": lambda n, p: dsp(n, p, staleness="bp"),
}


def _rank(rank: int, port: int, repetitions: int, batches: int, results: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(STAGES), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=STAGES)
    for repetition in range(repetitions):
        for probability in (0.0, 1 / 3):
            for name, case in CASES.items():
                os.environ["WORLD_SIZE"] = str(STAGES)
                rate = case(batches, probability)
                if rank == 0:  # DSP's last stage; torch's first: all ranks of it measure alike
                    results.append((probability, name, rate / LIMIT))
                    print(f"{repetition + 1}/{repetitions}  {probability:.2f}  {name}: {rate / LIMIT:.2f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batches", type=int, default=30)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.list()
        mp.spawn(_rank, args=(port, arguments.repetitions, arguments.batches, results), nprocs=STAGES)
        measured = list(results)
    expected = {
        "DSP, m = 2(K-1-k)": "limit >= 0.72",
        "DSP, m = 2(K-1-k), no recompute": "limit >= 0.95, ratio >= 1.4",
    }
    for probability, title in ((0.0, "equal stages"), (1 / 3, "each stage twice as slow with probability 1/3")):
        rows = [
            Row(
                name,
                [rate for p, n, rate in measured if (p, n) == (probability, name)],
                None if name.startswith("1F1B") else "1F1B, 8 microbatches",
                expected.get(name, "") if probability == 0 else "",
            )
            for name in CASES
        ]
        report(f"pipeline_{'equal' if probability == 0 else 'stragglers'}", f"4 stages, {title}", "of the limit", rows)


if __name__ == "__main__":
    main()
