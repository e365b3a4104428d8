"""Four stages of DSP in four processes, which sleep instead of computing, and their simulation: for simulation.py."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from stage_clock import SleepingStage, messages
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from lightning_stale.simulation import Costs, DSPSetting, StageTimes, parse_pipeline, run_pipeline

WORKERS = 4
FORWARD_S, BACKWARD_S, SLOW_STAGE = 0.020, 0.040, 1.5


def fit(strategy: Any, model: L.LightningModule, samples: Sequence[Tensor], batch: int, callbacks: list[Any]) -> None:
    """Train for an epoch."""
    L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=WORKERS,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(*samples), batch_size=batch))


def everyone(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each rank has."""
    found: list[Any] = [None] * WORKERS
    torch.distributed.all_gather_object(found, mine)
    return found


def rank() -> int:
    """Return this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Stages(L.LightningModule):
    """Four sleeping stages, of which the second may be slower."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        factors = [SLOW_STAGE if slow and k == 1 else 1.0 for k in range(WORKERS)]
        self.net = nn.Sequential(*(SleepingStage(64, FORWARD_S * factor, BACKWARD_S * factor) for factor in factors))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train_pipeline(name: str, batches: int, slow: bool) -> list[dict[str, Any]]:
    """Train an epoch; return the times of each stage, the first one first."""
    setting = parse_pipeline(name)
    assert isinstance(setting, DSPSetting)
    strategy = DSPStrategy(
        staleness=setting.staleness, recompute=setting.recompute, process_group_backend="gloo", split=[1, 2, 3]
    )
    same = torch.Generator().manual_seed(0)  # on all ranks
    model, stage = Stages(slow), WORKERS - 1 - rank()
    layer = model.net[stage]
    with messages(rank()) as found:
        fit(strategy, model, torch.randn(2, 8 * batches, 64, generator=same), 8, [])
    began = min([layer.forwards[0][0], *(one.began for one in found[:1])])
    ended = max([layer.backwards[-1][1], *(one.ended for one in found[-1:])])
    forward, backward = ([end - begin for begin, end in times] for times in (layer.forwards, layer.backwards))
    waited = sum(one.ended - one.began for one in found)
    mine = {"stage": stage, "began": began, "ended": ended, "forward": forward, "backward": backward, "waited": waited}
    mine["messages"] = found
    return sorted(everyone(mine), key=lambda one: one["stage"])


def compared_pipelines(batches: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per run of a pipeline: real, and simulated from its own log."""
    rows = []
    for one in runs:
        logs = one["logs"]
        forward, backward = (tuple(tuple(log[what]) for log in logs) for what in ("forward", "backward"))
        rest = [
            max(0.0, log["ended"] - log["began"] - log["waited"] - sum(log["forward"]) - sum(log["backward"])) / batches
            for log in logs
        ]
        outcome = run_pipeline(
            parse_pipeline(one["setting"]),
            StageTimes(one["setting"], forward, backward, tuple((seconds,) for seconds in rest)),
            Costs(message_s=message_s(logs)),
            batches=batches,
        )
        seconds = max(log["ended"] for log in logs) - min(log["began"] for log in logs)
        busy = sum(log["ended"] - log["began"] - log["waited"] for log in logs)
        found = {"rate": batches / seconds, "waiting": 1 - busy / (seconds * WORKERS)}
        simulated = {"rate": outcome.rate, "waiting": 1 - statistics.fmean(outcome.utilisation)}
        row = {"slow": one["slow"], "setting": one["setting"], "load": one["load"], "real": found, "own log": simulated}
        rows.append({**row, "rest_s": rest, "message_s": message_s(logs)})
    return rows


def message_s(logs: list[dict[str, Any]]) -> float:
    """Return how long a message takes that is waited for, on average."""
    times = []
    for what, onwards in (("features", 1), ("gradients", -1)):
        for stage in range(WORKERS):
            if 0 <= stage + onwards < WORKERS:
                sent = [began for of, is_sent, _, began, _ in logs[stage]["messages"] if is_sent and of == what]
                taken = [one[3:] for one in logs[stage + onwards]["messages"] if not one[1] and one[0] == what]
                times += [ended - max(asked, began) for began, (asked, ended) in zip(sent, taken, strict=True)]
    return statistics.fmean(times)
