"""What an optimizer's step is replaced with, on one object, and what of torch looks at it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stale.private import of_torch


def make(**options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(2))
    return parameter, torch.optim.SGD([parameter], lr=0.5, **options)


def test_a_step_runs_the_closure_and_what_replaces_it_and_nothing_else() -> None:
    parameter, optimizer = make()
    calls: list[str] = []
    undo = of_torch.replace_step(optimizer, lambda: calls.append("push"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        parameter.sum().backward()
        calls.append("closure")
        return 7.0

    with torch.no_grad():
        assert optimizer.step(closure) == 7.0
    assert calls == ["closure", "push"]
    assert parameter.tolist() == [1.0, 1.0]
    undo()
    optimizer.step()
    assert parameter.tolist() == [0.5, 0.5]
    assert not {"step", "_step_supports_amp_scaling"} & vars(optimizer).keys()


def test_a_scheduler_takes_it_for_a_step() -> None:
    for schedule_first in (True, False):
        _, optimizer = make()
        if schedule_first:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        of_torch.replace_step(optimizer, lambda: None)
        if not schedule_first:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            scheduler.step()


def test_without_it_the_scheduler_warns_that_the_order_is_wrong() -> None:
    """If it does not any more, the names that are set for it are of no use."""
    _, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_a_fused_optimizer_leaves_unscaling_to_the_scaler_meanwhile() -> None:
    _, optimizer = make(fused=True)
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    undo = of_torch.replace_step(optimizer, lambda: None)
    assert not optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    undo()
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]


def test_all_kinds_of_batch_norm_and_no_other_norm() -> None:
    assert all(map(of_torch.is_batch_norm, (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))))
    assert not any(map(of_torch.is_batch_norm, (nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2))))


def test_each_tensor_is_changed_by_its_own_other_one() -> None:
    tensors, others = [torch.full((2,), 5.0), torch.full((3, 1), 7.0)], [torch.ones(2), torch.full((3, 1), 2.0)]
    of_torch.subtract_each(tensors, others)
    assert [tensor.unique().tolist() for tensor in tensors] == [[4.0], [5.0]]
    of_torch.copy_each(tensors, others)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1.0], [2.0]]
