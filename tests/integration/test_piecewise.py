"""Values on their way to rank 0 and from it: whole, piece by piece."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.pipeline.divided import piecewise
from tests.integration.harness import run_workers
from tests.integration.models import assert_equal

CPU = torch.device("cpu")


def value_of(rank: int) -> dict[str, Any]:
    """Everything that an optimizer's state or a model may hold."""
    generator = torch.Generator().manual_seed(rank)
    large = torch.randn(50, 41, generator=generator)
    return {
        "large": large,
        "again": [large, large.t()],
        "last": torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last),
        "gaps": torch.randn(6, 6, generator=generator)[::2, 1:3],
        "spread": torch.tensor(3.0 + rank).expand(4, 5),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        "bool": torch.arange(5) % 2 == rank % 2,
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(rank),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "plain": (1, "two", None, {"three": 3.0}),
    }


def exchange(rank: int) -> tuple[Any, Any, list[int]]:
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    piecewise.PIECE_BYTES = 1000
    sizes: list[int] = []
    original = dist.send

    def send(tensor: Tensor, *args: Any) -> None:
        sizes.append(tensor.nbytes)
        original(tensor, *args)

    dist.send = send
    mine = value_of(rank)
    gathered = piecewise.gather(piecewise.Packed(mine), mine, CPU)
    values = [value_of(10 + other) for other in range(3)] if rank == 0 else None
    entry = piecewise.spread([piecewise.Packed(value) for value in values or ()], values, CPU)
    dist.destroy_process_group()
    return gathered, entry, sizes


def test_a_value_arrives_as_it_was(tmp_path: Path) -> None:
    ranks = run_workers(exchange, 3, tmp_path)
    gathered = ranks[0][0]
    assert [rank[0] for rank in ranks[1:]] == [None, None]
    for source, value in enumerate(gathered):
        expected = value_of(source)
        for name in expected.keys() - {"sparse"}:
            assert_equal(value[name], expected[name], name)
        assert torch.equal(value["sparse"].to_dense(), expected["sparse"].to_dense())
        assert value["last"].stride() == expected["last"].stride(), "channels_last stays so"
    assert gathered[1]["again"][0] is gathered[1]["large"], "sent once"
    for rank, (_, entry, _) in enumerate(ranks):
        assert_equal(entry["gaps"], value_of(10 + rank)["gaps"])
    sizes = ranks[1][2]
    description = sizes[1]
    assert max(sizes[2:]) == 1000 < 50 * 41 * 4, "in pieces"
    assert description < 20_000, "the tensors are not in it"


def test_what_cannot_be_pickled_fails_before_anybody_waits() -> None:
    with pytest.raises((AttributeError, TypeError, Exception), match=r"pickle|local"):
        piecewise.Packed({"function": lambda: None})


def test_a_copy_with_other_tensors() -> None:
    value = value_of(0)
    packed = piecewise.Packed(value)
    copied = packed.unpack([tensor + 1 if tensor.dtype == torch.float32 else tensor for tensor in packed.tensors])
    assert torch.equal(copied["large"], value["large"] + 1)
    assert copied["again"][0] is copied["large"]
    assert copied["plain"] == value["plain"]
