"""A message says all there is to know of its tensors; their bytes follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stale.pipeline.channels.message import CLOSE, DATA, Form, Header, describe, described
from lightning_stale.pipeline.values import strides
from lightning_stale.pipeline.values.trees import put_together

TENSORS = {
    "plain": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6).view(2, 3).t(),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "expanded": torch.tensor([1.0, 2.0]).expand(4, 2),
    "with gaps": torch.arange(12, dtype=torch.float64)[::2],
    "scalar": torch.tensor(3, dtype=torch.int16),
    "empty": torch.zeros(0, 4),
    "bfloat16": torch.randn(5).to(torch.bfloat16),
    "complex": torch.randn(3, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "requires a gradient": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_comes_back_from_its_form_and_its_bytes(tensor: Tensor) -> None:
    form = Form.of(tensor)
    sent = strides.flat(tensor).view(torch.uint8) if tensor.numel() > 0 else torch.empty(0, dtype=torch.uint8)
    assert form.nbytes == sent.numel()
    back = form.tensor(sent.clone())
    assert torch.equal(back, tensor)
    assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert form.requires_grad is tensor.requires_grad
    assert form.on_cpu


def test_a_value_comes_back_from_its_description_and_its_tensors() -> None:
    value: dict[str, Any] = {"tensors": tuple(TENSORS.values()), "plain": [1, 2.5, "three", None]}
    packed, tensors = describe(value)
    tree, forms = described(packed)
    back = put_together(tree, tensors)
    assert back["plain"] == value["plain"]
    assert all(a is b for a, b in zip(back["tensors"], value["tensors"], strict=True))
    assert forms == [Form.of(tensor) for tensor in TENSORS.values()]


def test_the_same_kind_of_value_has_the_same_description() -> None:
    """So that it is sent once; another shape is another one."""
    assert describe((torch.ones(2, 3), 1))[0] == describe((torch.zeros(2, 3), 1))[0]
    assert describe((torch.ones(2, 3), 1))[0] != describe((torch.ones(3, 2), 1))[0]


def test_what_cannot_travel_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(TypeError, match="object cannot travel between stages"):
        describe((torch.ones(2), object()))


@pytest.mark.parametrize("header", [Header(7, 120, DATA), Header(-4, 0, DATA), Header(0, 0, CLOSE)])
def test_a_header_is_received_into_what_it_takes(header: Header) -> None:
    room = Header.empty()
    assert (room.shape, room.dtype) == (header.pack().shape, header.pack().dtype)
    assert Header(*room.copy_(header.pack()).tolist()) == header
