"""Accuracy of the apply rules at equal samples, 3 seeds: eight workers learn handwritten digits at high rates.

The workers are emulated in one process, in the order in which eight that run in parallel would push: a step takes
20 ms +- 20 %, and one in seven of them five times as long, as in experiment=digits. So two cores are enough, what else
runs on them changes nothing, and a seed gives the same numbers every time. Gradients, the server's store, its
optimizer, the rules and the data are the real ones, and as there the workers share out each epoch and meet at its end.

All use SGD with momentum 0.9 (Dana: its own) and the same learning rate. One row has no momentum, and the learning rate
that then goes equally far; the last has it scaled by the number of workers, as is usual for DDP. The first row is what
it would be without staleness. Plain ASP bears the lower of the two rates just so, and not the higher one.

    python benchmarks/apply_rules.py [--lr 0.01 0.015] [--epochs 12] [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import Row, report
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_stale import ApplyRule, Dana, DelayCompensated, Plain, Ringmaster, Scaled
from lightning_stale.parameter_server.options import read_options
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.transport.layout import Layout
from recipes.data import Digits
from recipes.models import digits_cnn

WORKERS, BATCH, MOMENTUM = 8, 16, 0.9
STEP_S, JITTER, SLOW_SHARE, SLOWDOWN = 0.020, 0.2, 0.15, 5.0


@dataclass
class Run:
    """One way to train: the rule, how many workers, whether they average, and the factor on the learning rate."""

    rule: Callable[[], ApplyRule] = Plain
    workers: int = WORKERS
    averages: bool = False
    lr_factor: float = 1.0
    momentum: float = MOMENTUM


RUNS = {
    "one worker: nothing stale": Run(workers=1),
    "asp, plain": Run(),
    "asp, ringmaster (R=16)": Run(Ringmaster),
    "asp, ringmaster (R=8)": Run(lambda: Ringmaster(R=8)),
    "asp, delay-compensated": Run(DelayCompensated),
    "asp, delay-compensated (constant)": Run(lambda: DelayCompensated(adaptive=False)),
    "asp, dana": Run(lambda: Dana(MOMENTUM), momentum=0.0),
    "asp, scaled": Run(Scaled),
    "asp, plain, no momentum, 10 x the learning rate": Run(lr_factor=1 / (1 - MOMENTUM), momentum=0.0),
    "ddp or bsp": Run(averages=True),
    "ddp or bsp, 8 x the learning rate": Run(averages=True, lr_factor=WORKERS),
}


@dataclass
class Result:
    """Of one seed: percent of the test images that are right, and what was seen of staleness."""

    accuracy: float
    staleness: list[int] = field(default_factory=list)
    refused: int = 0


class Emulation:
    """Workers with weights of their own, a store, and the time at which each of them is done with its batch."""

    def __init__(self, run: Run, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.run, self.random = run, random.Random(seed)
        data = Digits(batch_size=BATCH, seed=seed)
        self.train, self.test = data.load(train=True).tensors, data.load(train=False).tensors
        self.model = digits_cnn()
        parameters = list(self.model.parameters())
        layout = Layout.of(parameters)
        rule = run.rule()
        self.store = ParameterStore(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, rule)
        self.store.set_weights(range(len(parameters)), parameters)
        optimizer = torch.optim.SGD(self.store.parameters, lr=lr * run.lr_factor, momentum=run.momentum)
        self.store.set_optimizers([optimizer])
        rule.begin(run.workers, 1)
        rule.check([optimizer])
        self.result = Result(accuracy=0.0)

    def epoch(self) -> None:
        """Let each worker take its share of a new order of the samples."""
        order = torch.randperm(len(self.train[1]))
        shares = [order[worker :: self.run.workers].split(BATCH) for worker in range(self.run.workers)]
        if self.run.averages:
            for turn in range(max(map(len, shares))):
                now = self.held()
                self.store.apply_mean(
                    [self.push(w, share[turn], now, 0) for w, share in enumerate(shares) if turn < len(share)]
                )
            return
        held, pulled = [self.held()] * self.run.workers, [self.store.version] * self.run.workers
        left = [list(share) for share in shares]
        ready = [(self.step_s(), worker) for worker in range(self.run.workers)]
        heapq.heapify(ready)
        while ready:
            now, worker = heapq.heappop(ready)
            staleness = self.store.version - pulled[worker]
            self.result.staleness.append(staleness)
            applied = self.store.apply(self.push(worker, left[worker].pop(0), held[worker], staleness))
            self.result.refused += not applied
            held[worker], pulled[worker] = self.held(), self.store.version
            if left[worker]:
                heapq.heappush(ready, (now + self.step_s(), worker))

    def push(self, worker: int, rows: Tensor, then: list[Tensor], staleness: int) -> Push:
        """Compute a gradient at the weights ``then``."""
        self.load(then)
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(self.train[0][rows]), self.train[1][rows]).backward()
        gradients = [parameter.grad.clone() for parameter in self.model.parameters()]
        options = read_options(self.store.optimizers[0])
        return Push(0, [True] * len(gradients), gradients, options, None, worker, staleness, then)

    def step_s(self) -> float:
        slow = SLOWDOWN if self.random.random() < SLOW_SHARE else 1.0
        return STEP_S * slow * self.random.uniform(1 - JITTER, 1 + JITTER)

    def held(self) -> list[Tensor]:
        return [view.clone() for view in self.store.views]

    @torch.no_grad()
    def load(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def accuracy(self) -> float:
        self.load(self.store.views)
        return 100 * float((self.model(self.test[0]).argmax(1) == self.test[1]).float().mean())


def measure(run: Run, lr: float, epochs: int, seed: int) -> Result:
    """Train, and return what came of it."""
    emulation = Emulation(run, lr, seed)
    for _ in range(epochs):
        emulation.epoch()
    emulation.result.accuracy = emulation.accuracy()
    return emulation.result


def described(name: str, results: list[Result]) -> str:
    """Return the name with the mean of the seeds, and staleness in the mean (and at most), in updates."""
    text = f"{name}: mean {statistics.mean(result.accuracy for result in results):.2f}"
    refused = sum(result.refused for result in results) / max(1, sum(len(result.staleness) for result in results))
    staleness = [tau for result in results for tau in result.staleness]
    if max(staleness, default=0) > 0:
        text += f", staleness {statistics.mean(staleness):.1f} ({max(staleness)})"
    return text + (f", {refused:.1%} not applied" if refused else "")


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.015])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for lr in arguments.lr:
        found = {
            name: [measure(run, lr, arguments.epochs, seed) for seed in arguments.seeds]
            for name, run in track(RUNS.items(), description=f"learning rate {lr}")
        }
        rows = [Row(described(name, of), [result.accuracy for result in of]) for name, of in found.items()]
        title = f"Digits, {WORKERS} workers, learning rate {lr}, {arguments.epochs} epochs: test accuracy"
        report(f"apply_rules_{lr}", title, "%", rows)


if __name__ == "__main__":
    main()
