"""A strategy whose fit, where it is elastic, others may join while it runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from lightning_stale.elastic import Elastic
from lightning_stale.launchers import ScriptLauncher
from lightning_stale.private import of_lightning, of_torch
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.checks import check_elastic_environment
from lightning_stale.strategies.newcomer import Newcomer, has_joined, newcomer_of_this_process
from lightning_stale.strategies.present import Members
from lightning_stale.strategies.starting_point import StartingPoint, write_down
from lightning_stale.topology import Topology
from lightning_stale.transport import invitation
from lightning_stale.transport.invitation import Invitation


class _Joins(Protocol):
    """What is asked of the update."""

    members: tuple[tuple[int, int], ...]

    def join(self, run: str, rank: int, check: Callable[[], None]) -> tuple[int, int]:
        """Wait until the fit of ``run`` lets this process in; return its rank and generation."""

    def segment(self) -> dict[str, Any]:
        """Return where in the epoch all are."""

    def deposit(self, state: bytes) -> None:
        """On rank 0: let those who come have ``state``, and let them in."""

    def deposited(self) -> bytes:
        """Return the last deposit."""


class JoinableStrategy(StaleStrategy):
    """Lets others find the fit, and lets this process join one, if it was started to."""

    elastic: Elastic | None = None
    _newcomer: Newcomer | None = None
    _start: StartingPoint | None = None
    _run = ""
    _store: Store | None = None  # while rank 0 invites others

    @property
    def _joins(self) -> _Joins:
        return cast(_Joins, self._update)

    def _check_environment(self) -> None:
        super()._check_environment()
        if self.elastic is not None:
            check_elastic_environment(self.elastic)

    # --- one who joins ----------------------------------------------------------------------------------------------

    def setup_distributed(self) -> None:
        """Have the group of all ranks; a newcomer, one of its own."""
        self._newcomer = newcomer_of_this_process()
        if self._newcomer is None:
            super().setup_distributed()
            return
        assert self.cluster_environment is not None
        self.set_world_ranks()
        self._newcomer.form_group(
            self.cluster_environment.main_address,
            self.cluster_environment.main_port,
            of_lightning.choose_backend(self),
            self.timeout,
        )

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self._newcomer is not None and self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self._newcomer.rank_here)
            self.cluster_environment.set_world_size(1)
            rank_zero_only.rank = self._newcomer.rank_here  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """Set up; a newcomer will resume from where rank 0 is."""
        super().setup_environment()
        trainer = self._require_trainer()
        if self._newcomer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.elastic is None:
            raise MisconfigurationException(
                f"this process was started to join a fit, and here it is not elastic: {type(self).__name__} must be "
                "made with elastic=True, as on rank 0"
            )
        self._start = StartingPoint(trainer, self._join)
        self._undo_setup.append(self._start.undo)

    def _join(self) -> bytes:
        assert self._newcomer is not None
        self._run = self._newcomer.find_run()
        member = self._joins.join(self._run, self._newcomer.rank, self._check_signals)
        self._newcomer.rank, self._newcomer.generation = member
        self.set_world_ranks()
        return self._joins.deposited()

    @property
    def joined_batches(self) -> Mapping[str, Any] | None:
        """Where in the epoch a newcomer begins."""
        return None if self._start is None else self._start.batches

    @property
    def topology(self) -> Topology:
        """What the ranks are to each other; to a newcomer, what they were when the run began."""
        if self._start is not None and self._start.known:
            return Topology(self._start.workers, nodes=self.num_nodes)
        return super().topology

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Those of the ranks; until it meets others, a newcomer is alone."""
        if self._newcomer is not None and self.world_size == 1:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    @property
    def _here(self) -> Members:
        if self._newcomer is None:
            return super()._here
        return ((self._newcomer.rank, self._newcomer.generation),)

    def _new_run(self) -> str:
        return super()._new_run() if self._newcomer is None else self._run

    def _may_meet(self) -> bool:
        if self._newcomer is None:
            return super()._may_meet()
        # the first that it meets the others for may be a collective, such as ModelCheckpoint's before it saves
        return self._present.elastic and not self._newcomer.sets_up and not self._is_interrupted()

    # --- those who are there ----------------------------------------------------------------------------------------

    def _begin(self, run: str) -> None:
        if self.elastic is None:
            super()._begin(run)
            return
        self._host.invites = self._newcomer is None
        super()._begin(run)
        if self._newcomer is None and self.is_global_zero:
            self._invite(run)
        if isinstance(self.launcher, ScriptLauncher):
            self.launcher.begin_elastic_fit(self.elastic.max_restarts, self.global_rank)

    def _invite(self, run: str) -> None:
        """Let others find the fit, and say on the screen how."""
        assert self.cluster_environment is not None
        self._store = of_torch.shared_store()  # the group over it may be gone when the run ends
        Invitation(run, os.environ.get("PL_GLOBAL_SEED")).post(self._store)
        address, port = self.cluster_environment.main_address, self.cluster_environment.main_port
        command = ["python", "-m", "lightning_stale", "join", f"{address}:{port}"]
        command += ["--secret", str(self._host.secret_file), "--", *_script()]
        rank_zero_info(f"Another worker joins this fit with: {shlex.join(command)}")

    def before_segment(self) -> None:
        """All are about to ask for batches after a meeting: let those in who have come."""
        if self._newcomer is not None:
            self._newcomer.sets_up = False
        elif self.elastic is not None and self.is_global_zero:
            trainer = self._require_trainer()
            self._joins.deposit(write_down(trainer, self._joins.segment(), self.topology.world_size))

    def on_train_end(self) -> None:
        super().on_train_end()
        if isinstance(self.launcher, ScriptLauncher):
            self.launcher.end_elastic_fit({rank for rank, _ in self._joins.members})
        self._end_joining()

    def teardown(self) -> None:
        self._end_joining()
        super().teardown()

    def _end_joining(self) -> None:
        if self._store is not None:
            store, self._store = self._store, None
            with suppress(DistError, RuntimeError):  # it may have ended with the run
                invitation.withdraw(store)
        if self._newcomer is not None:
            self._newcomer = self._start = None
            has_joined()


def _script() -> list[str]:
    """Return how this script was started, as arguments of Python."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [*(["-m", spec.name] if spec is not None else [sys.argv[0]]), *sys.argv[1:]]
