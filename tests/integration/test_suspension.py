"""A run that is suspended for longer than its ranks have patience (Ctrl-Z, a scheduler that takes turns) goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stale import DSPStrategy, Elastic, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.transport import wire
from tests.integration.harness import is_server, marked, signal_test, workers
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches

PATIENCE_S = 2
STEPS = 300
STRATEGIES = {
    "dsp": lambda: DSPStrategy(split=[3]),
    "hpsgd": lambda: HPSGDStrategy(interval=1),
    "elastic": lambda: StaleSyncStrategy(paradigm="asp", elastic=Elastic(patience_s=PATIENCE_S)),
}


class UnderWay(Chain):
    """Says when it has trained for a moment; then for some seconds more."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 20 and self.global_rank == 0:
            signal_test(self.folder, "under-way")
        time.sleep(0.01)  # an accelerator
        return super().training_step(batch, batch_idx)


def train(rank: int, strategy: str, folder: str) -> int:
    wire.HEARTBEAT_MS, wire.HEARTBEAT_TIMEOUT_MS = 500, PATIENCE_S * 1_000  # of this rank's; the coordinator has more
    model = UnderWay()
    model.folder = folder
    elastic, data = strategy == "elastic", batches(STEPS)
    t = trainer(2, STRATEGIES[strategy](), max_epochs=1, use_distributed_sampler=elastic)
    t.fit(model, DataLoader(data.dataset, batch_size=data.batch_size) if elastic else data)
    if elastic:
        summary = t.strategy.summary()
        assert (summary["leaves"], summary["taken_back"], summary["updates"]) == (0, 0, STEPS)
        return 2 * t.global_step  # which counts the steps of each of two workers
    return t.global_step


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_taken_for_dead_after_a_suspension(strategy: str, tmp_path: Path) -> None:
    with workers(train, 2, tmp_path, strategy, str(tmp_path)) as group:
        group.wait_for("under-way")
        everybody = marked(group.mark, groups=[group.pid(rank) for rank in range(2)])
        host = "lightning_stale.parameter_server" if strategy == "elastic" else "lightning_stale.coordinator"
        assert any(is_server(process, host) for process in everybody)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in everybody:
                process.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(2 * PATIENCE_S)
        ended = group.join(timeout=60)
    assert [(worker.exitcode, worker.error) for worker in ended] == [(0, ""), (0, "")]
    assert [worker.result for worker in ended] == [STEPS, STEPS]
