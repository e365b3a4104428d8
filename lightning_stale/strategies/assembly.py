"""The blocks of one model, who of the ranks that hold it together has which, and the stages that run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.divided.ownership import constant_names, own_names
from lightning_stale.pipeline.divided.tensors import tensors_named
from lightning_stale.pipeline.partition.body import outside
from lightning_stale.pipeline.partition.costs import count_parameters
from lightning_stale.pipeline.partition.disjoint import check_disjoint
from lightning_stale.pipeline.partition.model import Split
from lightning_stale.pipeline.stage import Stage
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.strategies.divided_model import Owned
from lightning_stale.strategies.partitioning import partition
from lightning_stale.topology import Topology


class Assembly:
    """Of one run; each rank has as many consecutive blocks.

    Args:
        trainer: with the LightningModule.
        stages: the number of blocks.
        topology: of one replica.
        rank: this one.
        name: of the module to cut, as in ``DSPStrategy(module=...)``.
        split: how.

    Raises:
        MisconfigurationException: if the ranks cannot have as many blocks each.
    """

    def __init__(
        self, trainer: Trainer, stages: int, topology: Topology, rank: int, name: str | None, split: Split
    ) -> None:
        ranks = topology.stages
        if stages % ranks:
            starts = "" if isinstance(split, str) else f" with {ranks - 1} instead of {len(split)} starts in split"
            raise MisconfigurationException(
                f"stages={stages} on {ranks} devices: write a multiple of {ranks}, e.g. stages={ranks}{starts}, or "
                "devices=1 for virtual stages"
            )
        self._trainer, self._topology, self._name, self._split = trainer, topology, name, split
        self._per_rank = stages // ranks
        self.stages, self.mine = stages, self._blocks_of(rank)
        self.blocks: list[Block] = []
        self._owner: nn.Module | None = None

    def owner(self) -> nn.Module:
        """Return the module that the blocks replace; it is cut when this is called first."""
        if self._owner is None:
            self._owner, self.blocks = partition(self._trainer, self.stages, self._name, self._split)
        return self._owner

    def owned(self) -> Owned:
        """Return the names of the tensors that each rank owns, and of those that all may read."""
        module, fitting = self._trainer.lightning_module, self._trainer.state.fn == TrainerFn.FITTING
        ranks = self._topology.ranks_of_replica(0)
        if self._owner is None and self._split == "time" and fitting:
            return [tensors_named(module)] * len(ranks), set()  # it is measured whole, once there are optimizers
        self.owner()
        modules = [block.module for block in self.blocks]
        own = [
            own_names(
                module, [modules[k] for k in self._blocks_of(rank)], modules, with_rest=self._topology.has_loss(rank)
            )
            for rank in ranks
        ]
        return own, constant_names(module, modules)

    def make_stages(
        self, staleness: Staleness, recompute: bool, context: Callable[[], AbstractContextManager[Any]]
    ) -> list[Stage]:
        """Return the stages of this rank.

        Raises:
            MisconfigurationException: if a parameter is in two blocks, or in a block and outside of all.
        """
        check_disjoint(self.blocks, outside(self._trainer.lightning_module, self.owner()))
        return [
            Stage(
                self.blocks[k],
                staleness.m[k],
                recompute=recompute,
                first=k == 0,
                last=k == self.stages - 1,
                context=context,
            )
            for k in self.mine
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per stage, for the summary."""
        return [{"stage": k, "parameters": count_parameters(block.module)} for k, block in enumerate(self.blocks)]

    def forget_others(self) -> None:
        """Hold the blocks of other ranks no longer."""
        self.blocks = [block if k in self.mine else Block(nn.Module()) for k, block in enumerate(self.blocks)]

    def _blocks_of(self, rank: int) -> range:
        first = self._topology.position(rank).stage * self._per_rank
        return range(first, first + self._per_rank)
