"""Nested values: what optimizers hold goes through unchanged, and other objects are refused with their type."""

from __future__ import annotations

import collections
import threading
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_stale.transport.parcel import pack, unpack
from lightning_stale.transport.wire import WireError

moderate = settings(max_examples=150)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=8)
)


def carried(value: Any) -> Any:
    """Return what arrives of ``value``."""
    parcel = pack(value)
    buffer = torch.full((parcel.size,), 0xAB, dtype=torch.uint8)  # the gaps are not sent
    for offset, data in parcel.pieces:
        buffer[offset : offset + data.numel()] = data
    return unpack(buffer, parcel.head)


keys = st.one_of(st.integers(0, 99), st.text(max_size=4))
nested = st.recursive(
    st.one_of(plain, st.binary(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


@moderate
@given(nested)
def test_nested_values_round_trip(value: Any) -> None:
    decoded = carried(value)
    assert decoded == value
    assert repr(decoded) == repr(value)  # True is not 1, (1,) is not [1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(12.0)[::3],
        torch.zeros(0, 4),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([1.5, -2.0], dtype=torch.float16),
        torch.tensor([True, False]),
        torch.tensor([2**62], dtype=torch.int64),
        torch.tensor([1 + 2j]),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_tensors_round_trip(tensor: Tensor) -> None:
    decoded = carried({0: {"exp_avg": tensor}})[0]["exp_avg"]
    assert (decoded.dtype, decoded.shape, decoded.requires_grad) == (tensor.dtype, tensor.shape, False)
    torch.testing.assert_close(decoded, tensor.detach(), rtol=0.0, atol=0.0, equal_nan=True)
    decoded.zero_()  # writable


def test_state_of_an_optimizer_round_trips() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.Adam(parameters, amsgrad=True)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    torch.testing.assert_close(carried(state), state, rtol=0.0, atol=0.0)


def test_subclasses_of_dict_become_dicts() -> None:
    value = {"a": collections.defaultdict(int, {1: 2}), "b": collections.OrderedDict(x=1)}
    assert carried(value) == {"a": {1: 2}, "b": {"x": 1}}


@pytest.mark.parametrize("value", [threading.Lock(), {1, 2}, object(), torch.float32], ids=lambda v: type(v).__name__)
def test_other_values_are_refused_with_their_type(value: Any) -> None:
    with pytest.raises(WireError, match=f"{type(value).__qualname__} cannot travel") as error:
        pack({"state": [value]})
    assert "may hold tensors, numbers, strings, lists, tuples and dicts" in str(error.value)


def test_a_number_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(WireError, match="int cannot travel"):
        pack({"step": 2**64})


def test_an_unknown_extension_is_refused() -> None:
    data = msgpack.packb(msgpack.ExtType(9, b""))
    with pytest.raises(WireError, match="extension 9"):
        unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8), len(data))


LARGE = torch.arange(40_000.0)


@pytest.mark.parametrize(
    "tensor",
    [LARGE, LARGE.reshape(200, 200).t(), LARGE[::2], LARGE.to(torch.bfloat16), LARGE.double() + 0.1j, LARGE < 7],
    ids=["dense", "transposed", "strided", "bfloat16", "complex", "flags"],
)
def test_large_tensors_among_small_ones_round_trip(tensor: Tensor) -> None:
    value = {"step": torch.tensor(3.0), "a": tensor, "b": [(tensor + 1 if tensor.dtype != torch.bool else ~tensor,)]}
    torch.testing.assert_close(carried(value), value, rtol=0.0, atol=0.0)


def test_large_tensors_are_not_copied_to_be_sent_nor_when_they_have_come() -> None:
    tensors = [LARGE.clone(), LARGE.clone() + 1]
    parcel = pack({"exp_avg": tensors, "step": torch.tensor(1.0)})
    assert [data.data_ptr() for _, data in parcel.pieces[1:]] == [tensor.data_ptr() for tensor in tensors]
    assert parcel.head < 500
    assert parcel.nbytes == parcel.head + 2 * LARGE.nbytes
    buffer = torch.zeros(parcel.size, dtype=torch.uint8)
    for offset, data in parcel.pieces:
        buffer[offset : offset + data.numel()] = data
    arrived = unpack(buffer, parcel.head)["exp_avg"]
    inside = range(buffer.data_ptr(), buffer.data_ptr() + buffer.numel())
    assert all(tensor.data_ptr() in inside for tensor in arrived)
    assert [tensor.untyped_storage().nbytes() for tensor in arrived] == [LARGE.nbytes] * 2  # saved without the rest
