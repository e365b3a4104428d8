"""Two ranks see whether they have read the same batch, whatever it is made of."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_stale.pipeline.alike.fingerprint import BUDGET, difference, fingerprint


def compare(one: Any, other: Any) -> str | None:
    return difference(msgpack.unpackb(msgpack.packb(fingerprint(one))), fingerprint(other))


@dataclass
class Pair:
    image: Tensor
    name: str


Point = namedtuple("Point", "x y")
NUMBERS = torch.arange(12.0).view(4, 3)
BATCHES: list[Any] = [
    NUMBERS,
    [NUMBERS, torch.arange(4)],
    {"ids": torch.arange(12).view(4, 3), "mask": torch.ones(4, 3, dtype=torch.bool), "text": ["a", "b", "c", "d"]},
    OrderedDict(pair=Pair(NUMBERS, "x"), point=Point(NUMBERS, 1.5), nothing=None, yes=True, of=b"bytes"),
    np.arange(12).reshape(4, 3),
    [np.float32(2), np.array(["text"]), {3, 1, 2}],
    pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]),
    [NUMBERS.to(torch.complex64), NUMBERS.bfloat16(), NUMBERS.byte(), torch.tensor(3), torch.tensor(float("nan"))],
    [torch.empty(0, 3), NUMBERS.to_sparse(), torch.tensor([float("inf"), 1.0])],
    torch.randn(3, BUDGET),
    torch.randn(3, 4, 200, 200).to(memory_format=torch.channels_last),
    torch.randn(2 * BUDGET + 1, 1),
    torch.randn(1700, 2),
    [object(), lambda: 1],
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_a_batch_is_like_itself(batch: Any) -> None:
    assert compare(batch, batch) is None


def swapped(tensor: Tensor, one: int = 1, other: int = 2) -> Tensor:
    order = torch.arange(len(tensor))
    order[[one, other]] = order[[other, one]]
    return tensor[order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (128, 3, 32, 32), (8, 3, 224, 224), (1700, 5)])
def test_two_samples_that_have_changed_places_are_noticed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = (100 * x.abs()).to(dtype) if not dtype.is_floating_point else x.to(dtype)
    if dtype == torch.bool:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        x[1], x[2] = True, False
    assert compare(x, swapped(x)) == f"the values of the batch ({str(dtype)[6:]} {shape})"
    assert compare(x, x.clone()) is None


def test_the_last_digits_of_other_processors_are_not_another_sample() -> None:
    for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-3)):
        x = torch.randn(16, 3, 20, 20)
        assert compare(x.to(dtype), (x * (1 + error * torch.randn_like(x))).to(dtype)) is None
    assert compare(torch.arange(4), torch.arange(4) + (torch.arange(4) == 3)) is not None, "integers have none"
    assert compare(1.5, 1.5 + 1e-9) is not None


def test_what_differs_is_named() -> None:
    x, y = NUMBERS, torch.arange(4)
    assert compare({"x": x, "y": y}, {"x": x, "y": y.flip(0)}) == "the values of ['y'] (int64 (4,))"
    assert compare([x, [Pair(x, "a")]], [x, [Pair(x, "b")]]) == "the values of [1][0].name (str)"
    assert compare([x], [x[:3]]) == "[0]: float32 (4, 3), and [0]: float32 (3, 3)"
    assert compare([x, y], [x]) == "2 values, and 1"
    assert compare({"x": x}, {"z": x}) == "['x']: float32 (4, 3), and ['z']: float32 (4, 3)"
    assert compare(x, x.double()) == "the batch: float32 (4, 3), and the batch: float64 (4, 3)"
    assert compare(torch.tensor(float("nan")), torch.tensor(1.0)) is not None
