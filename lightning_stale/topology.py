"""Which replica, stage and node each rank is, and the groups that follow from that: arithmetic, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where one rank is, each counted from 0."""

    replica: int
    stage: int
    """Of the ranks that hold a replica together; a rank may run several consecutive blocks of the model."""
    node: int


@dataclass(frozen=True)
class Topology:
    """The ranks of a run as replicas of a model, each divided over as many ranks.

    Ranks are numbered replica by replica. In each replica the first rank holds the last stage, and with it the loss;
    so global rank 0 has a loss, and a logger. A node holds consecutive ranks, as many as any other.

    Args:
        world_size: the number of ranks.
        stages: the number of ranks that hold one replica together; 1: each rank holds a whole one.
        nodes: the number of nodes.

    Raises:
        ValueError: for numbers that do not divide the ranks.

    Example::

        >>> from lightning_stale.topology import Topology
        >>> workers, pipeline, both = Topology(4), Topology(4, stages=4), Topology(4, stages=2, nodes=2)
        >>> [topology.replicas for topology in (workers, pipeline, both)]
        [4, 1, 2]
        >>> both.position(3)
        Position(replica=1, stage=0, node=1)
        >>> both.ranks_of_replica(1), both.ranks_of_stage(1), both.ranks_of_node(0)
        ((2, 3), (0, 2), (0, 1))
        >>> [rank for rank in range(4) if both.has_loss(rank)]
        [0, 2]
        >>> both.sampler_kwargs(3)
        {'num_replicas': 2, 'rank': 1}
    """

    world_size: int
    stages: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if not _is_count(self.world_size):
            raise ValueError(f"world_size={self.world_size!r}: write the number of ranks, an integer >= 1")
        for name, what in (("stages", "ranks of a replica"), ("nodes", "nodes")):
            count = getattr(self, name)
            if not _is_count(count) or self.world_size % count:
                raise ValueError(
                    f"{name}={count!r} for {self.world_size} ranks: write a number of {what} that divides "
                    f"{self.world_size}, e.g. {name}=1"
                )

    @property
    def replicas(self) -> int:
        """How many replicas of the model there are."""
        return self.world_size // self.stages

    @property
    def ranks_per_node(self) -> int:
        """How many ranks a node has."""
        return self.world_size // self.nodes

    def position(self, rank: int) -> Position:
        """Return where ``rank`` is.

        Raises:
            ValueError: if there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(
                f"there is no rank {rank} among {self.world_size}: write one from 0 to {self.world_size - 1}"
            )
        replica, place = divmod(rank, self.stages)
        return Position(replica, self.stages - 1 - place, rank // self.ranks_per_node)

    def rank(self, replica: int, stage: int) -> int:
        """Return the rank that holds ``stage`` of ``replica``."""
        if not 0 <= replica < self.replicas or not 0 <= stage < self.stages:
            raise ValueError(
                f"there is no stage {stage} of replica {replica}: write a stage from 0 to {self.stages - 1} and a "
                f"replica from 0 to {self.replicas - 1}"
            )
        return replica * self.stages + self.stages - 1 - stage

    def ranks_of_replica(self, replica: int) -> tuple[int, ...]:
        """Return the ranks that hold ``replica`` together; the first has the last stage, and the loss."""
        return tuple(sorted(self.rank(replica, stage) for stage in range(self.stages)))

    def ranks_of_stage(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that hold the same ``stage`` of all replicas: those that average, or share a server."""
        return tuple(self.rank(replica, stage) for replica in range(self.replicas))

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """Return the ranks on ``node``."""
        if not 0 <= node < self.nodes:
            raise ValueError(f"there is no node {node} among {self.nodes}: write one from 0 to {self.nodes - 1}")
        return tuple(range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node))

    def has_loss(self, rank: int) -> bool:
        """Whether ``rank`` has the loss and the metrics of its replica: it is the first rank of it."""
        return self.position(rank).stage == self.stages - 1

    @property
    def one_replica(self) -> bool:
        """Whether there is nothing to reduce or gather over: all ranks together are one replica."""
        return self.replicas == 1

    def sampler_kwargs(self, rank: int) -> dict[str, int]:
        """Return what a ``DistributedSampler`` needs: replicas have samples of their own, stages of one the same."""
        return {"num_replicas": self.replicas, "rank": self.position(rank).replica}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
