"""Lightning's collectives, of ranks that do not meet by themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stale.private import of_lightning
from lightning_stale.strategies.other_ranks import OtherRanks

_T = TypeVar("_T")
_PER_BATCH_HOOKS = {"training_step", "on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"}


class Collectives:
    """Begins a collective once all ranks are there: it would itself wait for its timeout, or speak of a connection.

    Args:
        others: who is met.
        may_meet: whether they can be met now, or each goes on by itself.
        undisturbed: returns what a collective runs in that nothing else on the device may meet.
    """

    def __init__(
        self,
        others: OtherRanks,
        may_meet: Callable[[], bool],
        undisturbed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._others, self._may_meet, self._undisturbed = others, may_meet, undisturbed

    def run(self, name: str, call: Callable[[], _T], group: Any | None = None) -> _T:
        """Run ``call``, a collective of all ranks (``group``: ``None``) or of some, which do not meet first."""
        with self._undisturbed():
            if group is None:
                self._meet(name)
            return self._others.guard(call)

    def barrier(self, call: Callable[[], None]) -> None:
        """Meet, which is a barrier; run ``call`` where the ranks cannot."""
        with self._undisturbed():
            if not self._meet("barrier"):
                self._others.guard(call)

    def _meet(self, collective: str) -> bool:
        if not self._others.joined or not self._may_meet():
            return False
        self._others.meet(f"a collective operation ({collective})")
        return True


def warn_within_batch(module: LightningModule | None) -> None:
    """Warn, if a training batch is under way, that what is logged there makes the workers meet."""
    trainer = None if module is None else of_lightning.trainer_of(module)
    if (
        trainer is not None
        and trainer.training
        and of_lightning.current_hook(trainer.lightning_module) in _PER_BATCH_HOOKS
    ):
        rank_zero_warn(
            "self.log(..., on_step=True, sync_dist=True) in a training batch makes all workers meet at every "
            "batch, so that a slow one holds up the others: write sync_dist=False, or on_step=False"
        )
