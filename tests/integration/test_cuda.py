"""Several workers on one GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from lightning_stale import HPSGDStrategy, StaleSyncStrategy
from tests.integration.harness import run_workers
from tests.integration.models import Regression, assert_same, loader, trainer, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class SharedGPU(CUDAAccelerator):
    """Hands the first GPU to every worker."""

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        return list(range(int(devices))) if not isinstance(devices, list) else devices

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", 0) for _ in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1


def fit(rank: int, world_size: int, paradigm: str, accelerator: str, transport: Any) -> tuple[dict[str, Any], int]:
    model = Regression("SGD", lr=0.05, momentum=0.9)
    strategy = StaleSyncStrategy(paradigm=paradigm, transport=transport, process_group_backend="gloo")
    t = trainer(
        world_size, strategy, accelerator=SharedGPU() if accelerator == "gpu" else "cpu", max_steps=50, max_epochs=None
    )
    t.fit(model, loader(samples=8 * 50 * world_size))
    return weights(model.cpu()), t.strategy.summary()["updates"]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_bsp_on_a_shared_gpu_equals_bsp_on_the_cpu(transport: str, tmp_path: Path) -> None:
    on_gpu = run_workers(fit, 2, tmp_path / "gpu", 2, "bsp", "gpu", transport)
    on_cpu = run_workers(fit, 2, tmp_path / "cpu", 2, "bsp", "cpu", transport)
    assert_same(on_gpu[0][0], on_gpu[1][0])
    assert_same(on_gpu[0][0], on_cpu[0][0], atol=1e-5)


def fit_hpsgd(rank: int, merge: str, accelerator: str) -> dict[str, Any]:
    model = Regression("SGD", lr=0.05, momentum=0.9)
    strategy = HPSGDStrategy(interval=2, merge=merge, process_group_backend="gloo")
    t = trainer(2, strategy, accelerator=SharedGPU() if accelerator == "gpu" else "cpu", max_steps=51, max_epochs=None)
    t.fit(model, loader(samples=8 * 51 * 2))
    return weights(model.cpu())


@pytest.mark.parametrize("merge", ["hpsgd", "cocod"])
def test_hpsgd_on_a_shared_gpu_equals_hpsgd_on_the_cpu(merge: str, tmp_path: Path) -> None:
    """The sums run on a stream of their own."""
    on_gpu = run_workers(fit_hpsgd, 2, tmp_path / "gpu", merge, "gpu")
    on_cpu = run_workers(fit_hpsgd, 2, tmp_path / "cpu", merge, "cpu")
    assert_same(on_gpu[0], on_gpu[1])
    assert_same(on_gpu[0], on_cpu[0], atol=1e-5)


def test_no_push_is_lost_on_a_shared_gpu(tmp_path: Path) -> None:
    results = run_workers(fit, 3, tmp_path, 3, "dssp", "gpu", "auto")
    assert [updates for _, updates in results] == [150, 150, 150]
