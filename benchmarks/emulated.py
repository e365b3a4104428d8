"""An emulated accelerator, and what the benchmarks of whole training runs share."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader, TensorDataset

BATCH, WIDTH, WARM_UP = 8, 512, 10


class _Sleep(torch.autograd.Function):
    """Takes the time of an accelerator's forward and backward pass (1 : 2), and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step_s: float) -> Tensor:
        ctx.step_s = step_s
        time.sleep(step_s / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.step_s / 3)
        return gradient, None


class Emulated(L.LightningModule):
    """1.1 M parameters behind an accelerator that takes ``step_s`` for a step."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self.step_s = step_s
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Linear(1024, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = _Sleep.apply(batch[0].requires_grad_(), self.step_s)
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class LocalSGD(DDPStrategy):
    """Lightning's post-local SGD, averaging every 4 steps; its DDPStrategy registers the hook on CUDA only."""

    def __init__(self) -> None:
        super().__init__(model_averaging_period=4)

    def _register_ddp_hooks(self) -> None:
        world = torch.distributed.group.WORLD
        self._ddp_comm_state = PostLocalSGDState(world, subgroup=_alone(), start_localSGD_iter=WARM_UP)
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


def milliseconds_per_step(strategy: Any, steps: int, step_s: float, workers: int, **trainer: Any) -> float:
    """Train for ``steps`` after a warm-up, and return the time of one on this rank."""
    samples = BATCH * (steps + WARM_UP) * workers * trainer.get("num_nodes", 1)  # one epoch: its end is not timed
    data = TensorDataset(torch.randn(samples, WIDTH), torch.zeros(samples).long())
    timer = Timer()
    options = {"accelerator": "cpu", "devices": workers, **trainer}
    L.Trainer(
        strategy=strategy,
        max_steps=steps + WARM_UP,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(Emulated(step_s), DataLoader(data, batch_size=BATCH))
    return 1e3 * (timer.ended - timer.started) / timer.steps


class Marks(L.Callback):
    """Keeps the moment at which each batch of this rank ended, by a clock that all processes of a host share."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def epoch(
    strategy: Any, steps: int, step_s: float, workers: int, callbacks: list[L.Callback]
) -> tuple[list[float], dict[str, Any]]:
    """Train for an epoch of ``steps`` per worker after a warm-up; return when this rank's batches ended, and counts."""
    samples = BATCH * (steps + WARM_UP) * workers
    data = TensorDataset(torch.randn(samples, WIDTH), torch.zeros(samples).long())
    marks = Marks()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=strategy,
        max_epochs=1,
        callbacks=[*callbacks, marks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Emulated(step_s), DataLoader(data, batch_size=BATCH))
    return marks.ends, trainer.strategy.summary() if hasattr(trainer.strategy, "summary") else {}


def batches_per_second(
    model: L.LightningModule, loader: DataLoader[Any], devices: int, strategy: Any, warm_up: int
) -> float:
    """Train ``model``, which keeps the time of every batch in ``marks``, for an epoch; return its speed when warm.

    It is 0 on ranks without the loss.
    """
    L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)
    marks = model.marks[warm_up:]
    return (len(marks) - 1) / (marks[-1] - marks[0]) if marks else 0.0


def quiet() -> None:
    """Keep Lightning's notes out of the tables."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
