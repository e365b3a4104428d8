"""BSP equals DDP; one worker equals the plain Trainer bit for bit, under every paradigm and with every optimizer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_stale import StaleSyncStrategy
from lightning_stale.paradigms import PARADIGMS
from tests.integration.harness import run_workers
from tests.integration.models import Regression, assert_equal, assert_same, loader, trainer, weights

STEPS = 100


def fit(world_size: int, strategy: Any, optimizer: str, options: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
    model = Regression(optimizer, **options)
    t = trainer(world_size, strategy, max_steps=STEPS, use_distributed_sampler=world_size > 1, **kwargs)
    t.fit(model, loader(samples=8 * 32 * world_size))
    assert t.global_step == STEPS
    return weights(model)


def fit_each(rank: int, world_size: int, strategies: list[Any], *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
    return [fit(world_size, strategy, *args, **kwargs) for strategy in strategies]


SGD = ("SGD", {"lr": 0.05, "momentum": 0.9})
ADAM = ("Adam", {"lr": 0.01})


@pytest.mark.parametrize(("optimizer", "options"), [SGD, ADAM], ids=["SGD", "Adam"])
def test_one_worker_equals_the_plain_trainer_bit_for_bit(
    optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    strategies = ["auto", *PARADIGMS, StaleSyncStrategy(paradigm="dssp", transport="tcp")]
    (results,) = run_workers(fit_each, 1, tmp_path, 1, strategies, optimizer, options)
    for strategy, result in zip(strategies[1:], results[1:], strict=True):
        assert_equal(results[0], result, str(strategy))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("optimizer", "options", "atol"), [(*SGD, 1e-6), (*ADAM, 1e-5)], ids=["SGD momentum", "Adam"])
def test_bsp_equals_ddp(optimizer: str, options: dict[str, Any], atol: float, world_size: int, tmp_path: Path) -> None:
    strategies = ["ddp", *(StaleSyncStrategy(paradigm="bsp", transport=transport) for transport in ("shm", "tcp"))]
    for ddp, *bsp in run_workers(fit_each, world_size, tmp_path, world_size, strategies, optimizer, options):
        assert not torch.equal(ddp["net.0.weight"], Regression().net[0].weight)
        for transported in bsp:
            assert_same(ddp, transported, atol=atol)


# The first gradients have a norm of about 1 and elements of about 0.1: both ways of clipping change some, and not all.
@pytest.mark.parametrize("clipping", [(0.1, "norm"), (0.02, "value")])
def test_bsp_clips_as_ddp_does(clipping: tuple[float, str], tmp_path: Path) -> None:
    value, algorithm = clipping
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}
    for ddp, bsp in run_workers(fit_each, 2, tmp_path, 2, ["ddp", "bsp"], *SGD, **options):
        assert_same(ddp, bsp, atol=1e-6)


def optimizer_classes() -> list[str]:
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    refused = ("Optimizer", "LBFGS", "SparseAdam")  # the base; refused at the start of fit; for sparse gradients
    return [name for name, cls in classes if issubclass(cls, torch.optim.Optimizer) and name not in refused]


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in optimizer_classes()},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD foreach": {"momentum": 0.9, "foreach": True},
    "Adam fused": {"fused": True},
    "Adam amsgrad": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "AdamW tensor": {"lr": torch.tensor(0.01), "foreach": False},
    "RMSprop centered": {"centered": True, "momentum": 0.5},
    "Adagrad decay": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
}


class Zoo(L.LightningModule):
    """One network for each optimizer and variant, so that one run tries them all."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.nets = nn.ModuleDict({name: self._net(bias=name != "Muon") for name in VARIANTS})

    @staticmethod
    def _net(bias: bool) -> nn.Sequential:  # Muon takes matrices only
        return nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 1, bias=bias))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, net in zip(self.optimizers(), self.nets.values(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            getattr(torch.optim, name.split()[0])(net.parameters(), **VARIANTS[name]) for name, net in self.nets.items()
        ]


def fit_zoo(rank: int, strategies: list[str]) -> list[Any]:
    results = []
    for strategy in strategies:
        model = Zoo()
        t = trainer(1, strategy, max_epochs=2, use_distributed_sampler=False)
        t.fit(model, loader(samples=8 * 10))
        results.append((weights(model), [optimizer.state_dict() for optimizer in t.optimizers]))
    return results


def test_every_torch_optimizer_equals_its_plain_self_bit_for_bit(tmp_path: Path) -> None:
    (((plain, plain_states), (stale, stale_states)),) = run_workers(fit_zoo, 1, tmp_path, ["auto", "dssp"])
    assert_same(plain, stale)
    for name, plain_state, stale_state in zip(VARIANTS, plain_states, stale_states, strict=True):
        assert plain_state["state"] or name == "SGD"
        assert_equal(plain_state, stale_state, name)
