"""Ranks as replicas, stages and nodes: the ones that strategies build, and those that nobody builds yet."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_stale.pipeline.channels.links import stage_mesh
from lightning_stale.topology import Position, Topology

SHAPES = [
    Topology(world_size, stages, nodes)
    for world_size, stages, nodes in product((1, 2, 4, 6, 12), (1, 2, 3, 6), (1, 2, 3))
    if world_size % stages == world_size % nodes == 0
]


@pytest.mark.parametrize(
    ("topology", "positions"),
    [
        (Topology(1), [(0, 0, 0)]),
        (Topology(3), [(0, 0, 0), (1, 0, 0), (2, 0, 0)]),
        (Topology(3, stages=3), [(0, 2, 0), (0, 1, 0), (0, 0, 0)]),
        (Topology(4, nodes=2), [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 1)]),
        (Topology(4, stages=2), [(0, 1, 0), (0, 0, 0), (1, 1, 0), (1, 0, 0)]),
        (Topology(6, stages=3, nodes=2), [(0, 2, 0), (0, 1, 0), (0, 0, 0), (1, 2, 1), (1, 1, 1), (1, 0, 1)]),
        (Topology(4, stages=4, nodes=2), [(0, 3, 0), (0, 2, 0), (0, 1, 1), (0, 0, 1)]),
    ],
    ids=repr,
)
def test_positions(topology: Topology, positions: list[tuple[int, int, int]]) -> None:
    assert [topology.position(rank) for rank in range(topology.world_size)] == [Position(*where) for where in positions]


@pytest.mark.parametrize("topology", SHAPES, ids=repr)
def test_groups_partition_the_ranks_and_agree_with_positions(topology: Topology) -> None:
    ranks = range(topology.world_size)
    where = {rank: topology.position(rank) for rank in ranks}
    for groups, of in (
        ([topology.ranks_of_replica(r) for r in range(topology.replicas)], "replica"),
        ([topology.ranks_of_stage(s) for s in range(topology.stages)], "stage"),
        ([topology.ranks_of_node(n) for n in range(topology.nodes)], "node"),
    ):
        assert sorted(rank for group in groups for rank in group) == list(ranks)
        for number, group in enumerate(groups):
            assert group == tuple(sorted(group))
            assert {getattr(where[rank], of) for rank in group} == {number}
    assert all(topology.rank(where[rank].replica, where[rank].stage) == rank for rank in ranks)


@pytest.mark.parametrize("topology", SHAPES, ids=repr)
def test_the_first_rank_of_each_replica_has_its_loss_and_nobody_else(topology: Topology) -> None:
    with_loss = [rank for rank in range(topology.world_size) if topology.has_loss(rank)]
    assert with_loss == [topology.ranks_of_replica(replica)[0] for replica in range(topology.replicas)]
    assert with_loss[0] == 0
    assert tuple(with_loss) == topology.ranks_of_stage(topology.stages - 1)
    assert topology.one_replica == (len(with_loss) == 1)


@pytest.mark.parametrize("topology", SHAPES, ids=repr)
def test_samplers_give_each_replica_its_own_samples_and_each_sample_once(topology: Topology) -> None:
    data = range(24)
    drawn = [
        list(DistributedSampler(data, shuffle=False, **topology.sampler_kwargs(rank)))  # type: ignore[arg-type]
        for rank in range(topology.world_size)
    ]
    for replica in range(topology.replicas):
        first, *others = topology.ranks_of_replica(replica)
        assert all(drawn[rank] == drawn[first] for rank in others)
    of_replicas = [drawn[topology.ranks_of_replica(replica)[0]] for replica in range(topology.replicas)]
    assert sorted(sample for samples in of_replicas for sample in samples) == list(data)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_it_is_the_mesh_that_the_pipelines_links_are_made_over(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[Any] = []
    monkeypatch.setattr(
        "lightning_stale.pipeline.channels.links.DeviceMesh", lambda _, ranks, **__: meshes.append(ranks)
    )
    stage_mesh(stages, torch.device("cpu"))
    topology = Topology(stages, stages=stages)
    assert meshes[0].tolist() == [[topology.rank(0, stage) for stage in range(stages)]]


def test_it_is_a_value() -> None:
    assert Topology(4, stages=2) == Topology(4, 2, 1)
    assert len({Topology(4), Topology(4), Topology(4, nodes=2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Topology(4).stages = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"world_size": 0}, ("world_size=0", "integer >= 1")),
        ({"world_size": True}, ("world_size=True",)),
        ({"world_size": 4, "stages": 3}, ("stages=3 for 4 ranks", "divides 4", "stages=1")),
        ({"world_size": 4, "stages": 0}, ("stages=0",)),
        ({"world_size": 4, "stages": 2.0}, ("stages=2.0",)),
        ({"world_size": 4, "nodes": 8}, ("nodes=8 for 4 ranks", "nodes=1")),
    ],
    ids=repr,
)
def test_impossible_ones_are_refused(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Topology(**values)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_who_is_not_there_is_refused() -> None:
    topology = Topology(4, stages=2)
    for ask in (
        lambda: topology.position(4),
        lambda: topology.position(-1),
        lambda: topology.rank(2, 0),
        lambda: topology.rank(0, 2),
        lambda: topology.ranks_of_node(1),
    ):
        with pytest.raises(ValueError, match="there is no"):
            ask()
