"""A validation in which somebody is lost is begun anew by all who are left: what is reported is of everything, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler

from lightning_stale.data.loader import with_shards
from lightning_stale.private import of_torch
from lightning_stale.private.of_lightning import callbacks
from lightning_stale.private.of_validation import ValidationLoop
from lightning_stale.strategies.kept import Kept
from lightning_stale.strategies.other_ranks import OtherRanks
from lightning_stale.strategies.present import Members, Present

REGION = "validation"


class SomebodyLost(BaseException):  # no error, and nobody's `except Exception` is to stop it
    """Breaks a validation off, on all ranks at the same meeting."""


class Validation:
    """The validations of one fit that may lose ranks.

    All of its meetings are of one region: wherever in it a rank is when somebody is lost, it meets the others at its
    next meeting, and all begin anew. Until the last of these meetings nothing is logged, and no ``on_validation_end``
    has run; what the module, its metrics and the callbacks have gathered is as it was at the beginning then.

    Args:
        trainer: of this rank.
        present: those who are there.
        others: who is met.
        meet: meets all, to have the same weights.
        follow: called after each other meeting.
        settle: called when weights that callbacks had swapped are back.
    """

    def __init__(
        self,
        trainer: Trainer,
        present: Present,
        others: OtherRanks,
        meet: Callable[[str], None],
        follow: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:
        self._trainer, self._present, self._others = trainer, present, others
        self._meet, self._follow, self._settle = meet, follow, settle
        self._loop = ValidationLoop(trainer)
        self._members: Members = ()  # of this validation
        self._loaders = (present.members, present.members_index)
        self.underway = False
        """Whether a rank that is lost now is lost to a validation."""
        self.undo = self._loop.wrap(self._run, self._accept)

    def check(self) -> None:
        """Break off if those present are not those with whom the validation has begun; call after each meeting.

        Raises:
            SomebodyLost: if so.
        """
        if self.underway and self._present.members != self._members:
            raise SomebodyLost

    def _run(self, run: Callable[[], Any]) -> Any:
        if self._trainer.sanity_checking or not self._present.elastic:
            return run()
        while True:
            self._meet("validation")
            self._begin()
            kept = self._keep()
            try:
                self._load()
                return run()
            except SomebodyLost:
                pass
            except RuntimeError as error:
                if not self.underway or not of_torch.is_lost_connection(error):
                    raise
                self._explain(error)
            finally:
                self._end()
            self._loop.break_off()
            kept.restore()
            self._settle()
            rank_zero_info(
                f"A worker was lost in a validation: it begins anew, over the {len(self._present.members)} that are "
                "left."
            )

    def _keep(self) -> Kept:
        gathering = (one for one in callbacks(self._trainer) if not isinstance(one, ProgressBar))
        return Kept([*self._trainer.lightning_module.modules(), *gathering])

    def _begin(self) -> None:
        self._members, self.underway = self._present.members, True
        self._others.region = REGION
        self._loop.begin()

    def _accept(self) -> None:
        self._others.meet("the end of validation")
        self._follow()
        self.underway, self._others.region = False, ""

    def _end(self) -> None:
        self.underway, self._others.region = False, ""
        self._loop.end()

    def _explain(self, error: RuntimeError) -> None:
        """A collective of the user's own has failed: raise that, unless somebody is lost."""
        self._present.leave_group()
        self._others.check(fresh=True)  # so that who was lost is known to be at the meeting
        try:
            self._others.meet(f"a validation that has broken off ({type(error).__name__}: {error})")
            self._follow()
        except SomebodyLost:
            return
        except Exception as other:
            raise other from error
        raise error

    def _load(self) -> None:
        """Let the loaders have the samples of those present."""
        members, index = self._loaders
        if members == self._members:
            return
        self._loaders = (self._members, self._present.members_index)
        shares = {"num_replicas": len(self._members), "rank": self._loaders[1]}
        for loader in self._loop.load_anew():
            if _is_of(loader, len(members), index):  # the user's own sampler, or one that Lightning finds there
                with_shards(loader, shares)


def _is_of(loader: DataLoader[Any], size: int, index: int) -> bool:
    samplers = (getattr(holder, "sampler", None) for holder in (loader, getattr(loader, "batch_sampler", None)))
    return any(
        isinstance(one, DistributedSampler) and (one.num_replicas, one.rank) == (size, index) for one in samplers
    )
