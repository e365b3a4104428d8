"""The replica and its flat tensors, whatever the parameters look like; the merge rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_stale.averaging.merge import MERGES, Merge, cocod, hpsgd
from lightning_stale.averaging.round_tensors import by_type


def test_one_flat_tensor_per_type_in_the_order_of_the_parameters() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    parameters: list[Tensor] = [nn.Parameter(torch.full((2, 2), float(n), dtype=t)) for n, t in enumerate(dtypes)]
    first, second = by_type(parameters)
    assert first.weights.flat.tolist() == [0.0] * 4 + [2.0] * 4
    assert second.weights.flat.tolist() == [1.0] * 4
    assert second.weights.flat.dtype == torch.bfloat16
    for replica in (first, second):
        assert torch.equal(replica.launched.flat, replica.weights.flat)
        assert not replica.change.flat.any()


@torch.no_grad()
@pytest.mark.parametrize("merge", [None, hpsgd, cocod])
def test_a_round_on_parameters_of_any_memory_layout(merge: Merge | None) -> None:
    parameters: list[Tensor] = [
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3, 4).T),
        nn.Parameter(torch.randn(())),
    ]
    assert not any(parameter.is_contiguous() for parameter in parameters[:2])
    before = [parameter.clone() for parameter in parameters]
    replica = by_type(parameters)[0]
    buffers = {id(buffer.flat) for buffer in (replica.weights, replica.launched, replica.change)}
    for parameter in parameters:
        parameter.add_(1)
    replica.weights.flat.sub_(4)

    replica.take_change()
    assert torch.allclose(replica.change.flat, torch.tensor(-1.0), atol=1e-6)
    replica.go_on(merge)
    moved = {None: 1.0, hpsgd: -4.0, cocod: -3.0}[merge]
    for parameter, value, part in zip(parameters, before, replica.launched.parts, strict=True):
        torch.testing.assert_close(parameter, value + moved)
        assert torch.equal(part, parameter)
    assert parameters[0].is_contiguous(memory_format=torch.channels_last)
    for part, value in zip(replica.weights.parts, before, strict=True):
        torch.testing.assert_close(part, value - 4)
    assert buffers == {id(buffer.flat) for buffer in (replica.weights, replica.launched, replica.change)}


@torch.no_grad()
def test_a_parameter_that_gets_other_memory_is_still_the_replica() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    (replica,) = by_type([parameter])
    parameter.data = torch.ones(3)
    replica.take_change()
    assert replica.change.flat.tolist() == [-1.0, -1.0, -1.0]
    replica.weights.flat.fill_(5.0)
    replica.go_on(hpsgd)
    assert parameter.tolist() == [5.0, 5.0, 5.0]


def test_merge_rules() -> None:
    weights, change = torch.tensor([5.0, 7.0]), torch.tensor([1.0, -2.0])
    for merge, expected in ((hpsgd, [5.0, 7.0]), (cocod, [4.0, 9.0])):
        out = torch.empty(2)
        assert merge(weights, change, out) is out
        assert out.tolist() == expected
        assert (weights.tolist(), change.tolist()) == ([5.0, 7.0], [1.0, -2.0])
    assert {"hpsgd": hpsgd, "cocod": cocod} == MERGES
