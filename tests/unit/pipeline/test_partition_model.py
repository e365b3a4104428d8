"""The user's ``split``, ``module`` and ``configure_stages()`` choose the way of partitioning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from torch import nn

from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.pipeline.partition.model import partition_model
from tests.unit.pipeline.networks import Chain, ResNet


def not_measured(body: nn.Sequential) -> Sequence[float]:
    raise AssertionError("nobody has asked for the time")


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [2, 2, 2, 8, 8]
        self.net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        self.small = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def layers(blocks: Any) -> list[list[str]]:
    return [[name for name, _ in block.module.named_children()] for block in blocks]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("params", [["0", "1", "2"], ["3"]]),
        ("time", [["0"], ["1", "2", "3"]]),
        ([2], [["0", "1"], ["2", "3"]]),
    ],
    ids=str,
)
def test_a_sequential_is_partitioned_by_parameters_time_or_starts(split: Any, expected: list[list[str]]) -> None:
    model = Nets()
    measure = (lambda body: [9.0, 1.0, 1.0, 1.0]) if split == "time" else not_measured
    owner, blocks = partition_model(model, 2, None, split, measure)
    assert owner is model.net, "the one with most parameters"
    assert layers(blocks) == expected
    assert [block.spreads for block in blocks] == [False, False]


def test_the_named_module_is_partitioned() -> None:
    model = Nets()
    owner, blocks = partition_model(model, 2, "small", "params", not_measured)
    assert owner is model.small
    assert layers(blocks) == [["0"], ["1"]]


def test_names_of_submodules_are_traced() -> None:
    model = nn.ModuleDict({"resnet": ResNet()})
    owner, blocks = partition_model(model, 3, None, ["layer2", "layer3"], not_measured)
    assert owner is model["resnet"]
    assert [block.spreads for block in blocks] == [True, True, False]


def test_the_wrong_number_of_names_is_an_error() -> None:
    model = nn.ModuleDict({"resnet": ResNet()})
    says = r"split=\['layer2'\] makes 2 blocks for 3 stages: write 2 names, or stages=2"
    with pytest.raises(PartitionError, match=says):
        partition_model(model, 3, None, ["layer2"], not_measured)


def test_a_module_that_is_no_sequential_needs_names() -> None:
    model = nn.ModuleDict({"resnet": ResNet()})
    with pytest.raises(PartitionError, match=r"resnet is a ResNet, not an nn\.Sequential: write the names .*split=\["):
        partition_model(model, 2, "resnet", "params", not_measured)


class Configured(Chain):
    def configure_stages(self) -> list[nn.Module]:
        return [self.net[:2], self.net[2:]]


def test_the_models_own_blocks_go_first() -> None:
    model = Configured()
    owner, blocks = partition_model(model, 2, None, [1], not_measured)
    assert owner is model
    assert [[*block.module] for block in blocks] == [[*model.net[:2]], [*model.net[2:]]]


def test_too_many_blocks_of_its_own_are_an_error() -> None:
    says = r"configure_stages\(\) returned 2 blocks for 3 stages: write stages=2, or return 3"
    with pytest.raises(PartitionError, match=says):
        partition_model(Configured(), 3, None, "params", not_measured)
