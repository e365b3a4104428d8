"""Several workers on one GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from lightning_stale import DSPStrategy, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.pipeline.channels.channel import end
from lightning_stale.pipeline.channels.process import ReceiveChannel, SendChannel
from tests.integration.harness import run_workers
from tests.integration.models import Regression, assert_same, loader, trainer, weights
from tests.integration.test_channels import gloo, keep_waiting
from tests.unit.pipeline.networks import Chain, batches

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


def fit_dsp(rank: int, world_size: int, accelerator: str, backend: str, staleness: Any) -> dict[str, Any]:
    """On one GPU over gloo, through page-locked memory; on one each over NCCL."""
    accelerators = {"cpu": "cpu", "shared": SharedGPU(), "own": "gpu"}
    strategy = DSPStrategy(split=[2, 5], staleness=staleness, stages=3, process_group_backend=backend)
    t = trainer(world_size, strategy, accelerator=accelerators[accelerator], max_epochs=2)
    model = Chain()
    t.fit(model, batches(20), batches(2, seed=5))
    return weights(model.cpu())


@pytest.mark.parametrize("staleness", ["bp", "dsp"])
def test_dsp_on_a_shared_gpu_equals_dsp_on_the_cpu(staleness: str, tmp_path: Path) -> None:
    on_gpu = run_workers(fit_dsp, 3, tmp_path / "gpu", 3, "shared", "gloo", staleness)
    on_cpu = run_workers(fit_dsp, 3, tmp_path / "cpu", 3, "cpu", "gloo", staleness)
    assert_same(on_gpu[0], on_cpu[0], atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="NCCL wants a GPU for each rank")
@pytest.mark.parametrize("staleness", ["bp", "dsp"])
def test_dsp_over_nccl_equals_dsp_on_the_cpu(staleness: str, tmp_path: Path) -> None:
    on_gpus = run_workers(fit_dsp, 3, tmp_path / "gpu", 3, "own", "nccl", staleness)
    on_cpu = run_workers(fit_dsp, 3, tmp_path / "cpu", 3, "cpu", "gloo", staleness)
    assert_same(on_gpus[0], on_cpu[0], atol=1e-5)


def send_what_is_computed_late(rank: int) -> list[float]:
    """A message is sent while the kernel that makes it still runs, and is changed as soon as it has been received."""
    device = torch.device("cuda", 0)
    with gloo(rank, 2) as groups:
        group = groups[0, 1][0]
        if rank == 0:
            sender = SendChannel(1, group, 4, device, keep_waiting)
            for n in range(20):
                value = torch.zeros(1 << 20, device=device)
                torch.cuda._sleep(10_000_000)
                sender.send(n, value.add_(n))
            end([sender], lambda: None)
            return []
        receiver = ReceiveChannel(0, group, 4, device, keep_waiting)
        got = []
        for n in range(20):
            value = receiver.receive(n)
            torch.cuda._sleep(10_000_000)  # and its memory must not be given to the next one meanwhile
            got.append((value.min() + value.max()) / 2)
            del value
        end([receiver], lambda: None)
        return [float(value) for value in got]


def test_channels_have_streams_of_their_own(tmp_path: Path) -> None:
    assert run_workers(send_what_is_computed_late, 2, tmp_path)[1] == [float(n) for n in range(20)]


def test_no_push_is_lost_on_a_shared_gpu(tmp_path: Path) -> None:
    results = run_workers(fit, 3, tmp_path, 3, "dssp", "gpu", "auto")
    assert [updates for _, updates in results] == [150, 150, 150]
