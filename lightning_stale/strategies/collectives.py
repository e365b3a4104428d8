"""Lightning's collectives, of ranks that do not meet by themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stale.failures import RunFailedError
from lightning_stale.private import of_lightning, of_torch
from lightning_stale.strategies.other_ranks import OtherRanks
from lightning_stale.strategies.present import Present

_T = TypeVar("_T")
_TRIES = 3
"""How often a collective is tried that fails though nobody is lost."""
_PER_BATCH_HOOKS = {"training_step", "on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"}


class Collectives:
    """Begins a collective once all ranks are there: it would itself wait for its timeout, or speak of a connection.

    In a run that may lose ranks, a collective has happened for all who are left, or for nobody: its ranks meet after it
    too, and if they are others then, or it has failed on one of them, all do it again, over those who are left.

    Args:
        others: who is met.
        may_meet: whether they can be met now, or each goes on by itself.
        undisturbed: returns what a collective runs in that nothing else on the device may meet.
        present: in a run that may lose ranks, those present, and their group.
        note_meeting: called after each meeting there; lets ``present`` follow it.
    """

    def __init__(
        self,
        others: OtherRanks,
        may_meet: Callable[[], bool],
        undisturbed: Callable[[], AbstractContextManager[None]],
        present: Present,
        note_meeting: Callable[[], None],
    ) -> None:
        self._others, self._may_meet, self._undisturbed = others, may_meet, undisturbed
        self._present, self._note_meeting = present, note_meeting

    def run(self, name: str, call: Callable[[], _T], group: Any | None = None) -> _T:
        """Run ``call``, a collective of all ranks (``group``: ``None``) or of some, which do not meet first.

        Args:
            name: of the collective.
            call: in a run that may lose ranks it is called again where need be: it leaves what it is given as it is.
            group: of the ranks.
        """
        with self._undisturbed():
            if group is None and self._meet(f"a collective operation ({name})") and self._present.elastic:
                return self.complete(name, call)
            return self._others.guard(call)

    def barrier(self, call: Callable[[], None]) -> None:
        """Meet, which is a barrier; run ``call`` where the ranks cannot."""
        with self._undisturbed():
            if not self._meet("a collective operation (barrier)"):
                self._others.guard(call)
            elif self._present.elastic and not self._present.grouped:
                self.complete("barrier", lambda: None)

    def complete(self, name: str, call: Callable[[], _T]) -> _T:
        """Run ``call`` for all who are left, or for nobody, in a run that may lose ranks; all have just met.

        Raises:
            RuntimeError: if it fails though nobody is lost.
            RunFailedError: if it does so elsewhere.
        """
        tries = 0
        while True:
            members = self._present.members
            results: list[_T] = []
            failure: RuntimeError | None = None
            try:
                self._present.join_group()
                results.append(call())
            except RuntimeError as error:
                if not of_torch.is_lost_connection(error):
                    raise
                failure = error
                self._others.guard(self._present.leave_group)
                self._others.check(fresh=True)  # so that who was lost is known to be at the meeting
            self._meet(f"the end of a collective operation ({name})")
            if self._present.members == members:
                if not self._others.guard(lambda: self._present.broken):
                    return results[0]
                tries += 1
                if tries == _TRIES:
                    text = f"a collective operation ({name}) has failed {_TRIES} times, and nobody is lost"
                    raise RunFailedError("error", text) if failure is None else failure
                self._present.try_again()

    def _meet(self, place: str) -> bool:
        if not self._others.joined or not self._may_meet():
            return False
        self._others.meet(place)
        if self._present.elastic:
            self._note_meeting()
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
