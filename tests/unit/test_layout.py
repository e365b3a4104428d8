"""The layout of parameters in a flat buffer: disjoint, aligned, with the strides that dense tensors have."""

from __future__ import annotations

import json

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_stale.transport.layout import ALIGNMENT, Layout

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.lists(
    st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), shapes, st.sampled_from(DTYPES)), max_size=8
)
moderate = settings(max_examples=60)


def buffer_of(layout: Layout) -> Tensor:
    return torch.zeros(layout.nbytes, dtype=torch.uint8)


@moderate
@given(tensors)
def test_views_have_the_shapes_and_types_of_the_tensors(given_tensors: list[Tensor]) -> None:
    layout = Layout.of(given_tensors)
    views = layout.views(buffer_of(layout))
    assert [(v.shape, v.dtype, v.stride()) for v in views] == [(t.shape, t.dtype, t.stride()) for t in given_tensors]


@moderate
@given(tensors)
def test_slots_are_aligned_and_disjoint(given_tensors: list[Tensor]) -> None:
    layout = Layout.of(given_tensors)
    buffer = buffer_of(layout)
    owner = [-1] * layout.nbytes
    for index, (slot, view) in enumerate(zip(layout.slots, layout.views(buffer), strict=True)):
        assert slot.offset % ALIGNMENT == 0
        assert view.numel() == 0 or view.data_ptr() - buffer.data_ptr() == slot.offset
        assert slot.nbytes == view.numel() * view.element_size()
        taken = owner[slot.offset : slot.offset + slot.nbytes]
        assert taken == [-1] * slot.nbytes, "slots overlap, or reach beyond the buffer"
        owner[slot.offset : slot.offset + slot.nbytes] = [index] * slot.nbytes


def test_views_write_through() -> None:
    layout = Layout.of([torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)])
    buffer = buffer_of(layout)
    first, second = layout.views(buffer)
    first.copy_(torch.arange(6.0).reshape(2, 3))
    second.fill_(7.0)
    again = layout.views(buffer)
    assert torch.equal(again[0], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(again[1], torch.full((4,), 7.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(3, 7).t(),
        torch.zeros(2, 3, 4).permute(2, 0, 1),
    ],
    ids=["channels_last", "transposed", "permuted"],
)
def test_dense_strides_are_kept(tensor: Tensor) -> None:
    layout = Layout.of([tensor])
    assert layout.views(buffer_of(layout))[0].stride() == tensor.stride()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 1).expand(3, 4), torch.zeros(6, 6)[::2, ::2]], ids=["expanded", "strided"]
)
def test_a_tensor_that_is_not_dense_gets_memory_of_its_own(tensor: Tensor) -> None:
    layout = Layout.of([tensor])
    view = layout.views(buffer_of(layout))[0]
    view.copy_(torch.arange(float(tensor.numel())).reshape(tensor.shape))
    assert torch.equal(view, torch.arange(float(tensor.numel())).reshape(tensor.shape))
    assert layout.slots[0].nbytes == tensor.numel() * 4


def test_an_empty_layout_can_be_mapped() -> None:
    assert Layout.of([]).nbytes == ALIGNMENT
    assert Layout.of([]).ranges([]) == []


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([], []),
        ([0], [(0, 40)]),
        ([2], [(128, 132)]),
        ([0, 1], [(0, 128)]),
        ([1, 0], [(0, 128)]),
        ([0, 2], [(0, 40), (128, 132)]),
        ([0, 1, 2], [(0, 132)]),
        ([3, 1, 2], [(64, 212)]),
    ],
)
def test_ranges_merge_neighbours(indices: list[int], expected: list[tuple[int, int]]) -> None:
    layout = Layout.of([torch.zeros(10), torch.zeros(16), torch.zeros(1), torch.zeros(5)])
    assert [slot.offset for slot in layout.slots] == [0, 64, 128, 192]
    assert layout.ranges(indices) == expected


@moderate
@given(tensors, st.data())
def test_ranges_cover_the_chosen_slots_and_no_other(given_tensors: list[Tensor], data: st.DataObject) -> None:
    layout = Layout.of(given_tensors)
    chosen = data.draw(st.sets(st.sampled_from(range(len(given_tensors))))) if given_tensors else set()
    ranges = layout.ranges(data.draw(st.permutations(sorted(chosen))))
    covered = {byte for start, end in ranges for byte in range(start, end)}
    assert sum(end - start for start, end in ranges) == len(covered)
    for index, slot in enumerate(layout.slots):
        mine = set(range(slot.offset, slot.offset + slot.nbytes))
        assert mine <= covered if index in chosen else not mine & covered


@moderate
@given(tensors)
def test_messages_make_the_same_layout(given_tensors: list[Tensor]) -> None:
    layout = Layout.of(given_tensors)
    message = layout.to_message()
    assert Layout.from_message(message) == layout
    assert Layout.from_message(json.loads(json.dumps(message))) == layout  # as it travels, see Endpoint
    assert Layout.from_message(msgpack.unpackb(msgpack.packb(message))) == layout


def test_saving_one_tensor_does_not_save_the_buffer() -> None:
    layout = Layout.of([torch.zeros(3), torch.zeros(100_000)])
    small, _ = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    assert small.untyped_storage().nbytes() == 12
