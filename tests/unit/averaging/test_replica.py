"""The replica as flat tensors, whatever the parameters look like; the merge rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_stale.averaging.merge import MERGES, cocod, hpsgd
from lightning_stale.averaging.replica import flatten


def test_one_flat_tensor_per_type_in_the_order_of_the_parameters() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    parameters: list[Tensor] = [nn.Parameter(torch.full((2, 2), float(n), dtype=t)) for n, t in enumerate(dtypes)]
    first, second = flatten(parameters)
    assert first.weights.tolist() == [0.0] * 4 + [2.0] * 4
    assert second.weights.tolist() == [1.0] * 4
    assert second.weights.dtype == torch.bfloat16
    for flat in (first, second):
        assert torch.equal(flat.launched, flat.weights)
        assert not flat.change.any()


@torch.no_grad()
def test_reads_and_writes_parameters_of_any_memory_layout() -> None:
    parameters: list[Tensor] = [
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3, 4).T),
        nn.Parameter(torch.randn(())),
    ]
    assert not any(parameter.is_contiguous() for parameter in parameters[:2])
    before = [parameter.clone() for parameter in parameters]
    (flat,) = flatten(parameters)
    values = flat.read()
    assert torch.equal(values, torch.cat([value.reshape(-1) for value in before]))

    flat.write(values + 1)
    for parameter, value, view in zip(parameters, before, flat.views(values), strict=True):
        assert torch.equal(parameter, value + 1)
        assert torch.equal(view, value)
    assert parameters[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat.weights, values)  # the replica alone has changed
    assert torch.equal(flat.launched, values)


def test_merge_rules() -> None:
    weights, change = torch.tensor([5.0, 7.0]), torch.tensor([1.0, -2.0])
    assert hpsgd(weights, change).tolist() == [5.0, 7.0]
    assert cocod(weights, change).tolist() == [4.0, 9.0]
    assert {"hpsgd": hpsgd, "cocod": cocod} == MERGES
    assert weights.tolist() == [5.0, 7.0]
