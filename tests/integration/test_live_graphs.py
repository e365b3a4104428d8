"""Weights under a live autograd graph: what a push brings back must not change what another loss is still to be
differentiated at; with one worker, everything is as with the plain Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_stale import StaleSyncStrategy
from lightning_stale.paradigms import PARADIGMS
from tests.integration.harness import run_workers
from tests.integration.models import assert_same, loader, trainer, weights

STEPS = 40


class Gan(L.LightningModule):
    """A small GAN whose losses are both computed before the first step, or one after the other, toggled."""

    automatic_optimization = False

    def __init__(self, sequential: bool = False) -> None:
        super().__init__()
        self.sequential = sequential
        self.errors: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
            self.critic = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(x.flip(0))
        of_generator = nn.functional.softplus(-self.critic(fake)).mean()
        of_critic = nn.functional.softplus(self.critic(fake.detach())) + nn.functional.softplus(-self.critic(x))
        return of_generator, of_critic.mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        x = batch[0]
        if self.sequential:
            for place, optimizer in ((1, critic), (0, generator)):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.losses(x)[place])
                optimizer.step()
                self.untoggle_optimizer(optimizer)
                if optimizer is critic:  # as a Wasserstein critic does
                    with torch.no_grad():
                        for parameter in self.critic.parameters():
                            parameter.clamp_(-0.3, 0.3)
            return
        frozen = copy.deepcopy([self.generator, self.critic])
        of_generator, of_critic = self.losses(x)
        generator.zero_grad()
        self.manual_backward(of_generator)
        generator.step()
        critic.zero_grad()
        self.manual_backward(of_critic)
        self.errors.append(self.error(frozen, x))
        critic.step()

    def error(self, frozen: list[nn.Module], x: Tensor) -> float:
        """Return how far the critic's gradient is from that at the weights ``frozen``, relative to it."""
        generator, critic = frozen
        fake = generator(x.flip(0)).detach()
        loss = (nn.functional.softplus(critic(fake)) + nn.functional.softplus(-critic(x))).mean()
        true = torch.autograd.grad(loss, list(critic.parameters()))
        off = sum(float((p.grad - t).norm()) for p, t in zip(self.critic.parameters(), true, strict=True))
        return off / sum(float(t.norm()) for t in true)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.02),
            torch.optim.SGD(self.critic.parameters(), lr=0.2, momentum=0.9),
        ]


def fit(rank: int, world_size: int, strategies: list[Any], sequential: bool) -> list[Any]:
    results = []
    for strategy in strategies:
        model = Gan(sequential)
        t = trainer(world_size, strategy, max_steps=2 * STEPS, use_distributed_sampler=world_size > 1)
        t.fit(model, loader(samples=8 * STEPS * world_size))
        summary = t.strategy.summary() if isinstance(t.strategy, StaleSyncStrategy) else None
        results.append((weights(model), model.errors, summary))
    return results


def strategies() -> list[Any]:
    """All paradigms, over both transports, with as many batches for each worker."""
    by_tcp = [StaleSyncStrategy(paradigm=paradigm, transport="tcp", data="shards") for paradigm in ("bsp", "asp")]
    return [*(StaleSyncStrategy(paradigm=paradigm, data="shards") for paradigm in PARADIGMS), *by_tcp]


def test_a_loss_is_differentiated_at_the_weights_it_was_computed_with(tmp_path: Path) -> None:
    for results in run_workers(fit, 2, tmp_path, 2, strategies(), False):
        for strategy, (_, errors, summary) in zip(strategies(), results, strict=True):
            assert len(errors) == STEPS
            assert max(errors) < 1e-6, f"{strategy}: {max(errors)}"
            assert [worker["pushes"] for worker in summary["workers"]] == [2 * STEPS] * 2
            if summary["paradigm"] == "BSP()":  # nobody else's updates lie between a worker's own two pushes
                assert [worker["max_staleness"] for worker in summary["workers"]] == [0, 0]


@pytest.mark.parametrize("sequential", [False, True], ids=["both losses first", "sequential and clamped"])
def test_one_worker_with_two_optimizers_equals_the_plain_trainer_bit_for_bit(sequential: bool, tmp_path: Path) -> None:
    names = ["auto", *strategies()]
    ((plain, *stale),) = run_workers(fit, 1, tmp_path, 1, names, sequential)
    for name, (result, _, summary) in zip(names[1:], stale, strict=True):
        assert_same(plain[0], result)
        assert summary["workers"][0]["max_staleness"] == 0, name
