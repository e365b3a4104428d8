"""What a rank has to do with the others of its run: it meets them, ends as they end, and tells them why it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_stale.coordinator import client as coordinator
from lightning_stale.coordinator.connection import ServerLostError
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.coordinator.process import CoordinatorProcess
from lightning_stale.failures import FailureKind, RunFailedError, describe
from lightning_stale.private import of_lightning, of_torch
from lightning_stale.recording.options import Recording
from lightning_stale.strategies.hosted_process import HostedProcess, serve_coordinator
from lightning_stale.topology import Topology

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_FAREWELL_S = 3.0
"""How long the coordinator outlives rank 0's part in a run: others may still have to hear why it ends."""


class Control(Protocol):
    """A rank's side of whoever knows where all ranks are, and what has failed."""

    @property
    def failure(self) -> RunFailedError | None:
        """Why the run ends, if that is known."""

    def check(self, fresh: bool = False) -> None:
        """Raise if a rank has failed or is lost; ``fresh``: ask, and do not rely on what was known a moment ago."""

    def blame(self) -> None:
        """After a connection has broken, find out whose, and raise that; nothing is raised if all are there."""

    def come_to(self, place: str, detail: str) -> None:
        """Let the others know that this rank's next meeting is at ``place``; do not wait for them."""

    def await_others(self) -> None:
        """Wait until all ranks have come; raise if they are at different places, or one has ended."""

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        """Come to ``place``, and wait for the others.

        Ranks that are at different places of one ``region`` meet all the same if somebody was lost.
        """

    def fail(self, kind: FailureKind, text: str) -> RunFailedError | None:
        """Tell all why this rank ends (``text`` follows "rank 1 "); return what had failed before."""

    def close(self, finished: bool) -> None:
        """Leave."""


class MeetsForBatches(Protocol):
    """Whose batches are taken back where all meet."""

    def check_meeting(self) -> None:
        """Raise if there can be no meeting now that they only wait for."""

    def has_met(self) -> None:
        """All have met."""


class OtherRanks:
    """The others of one run, from when this rank has joined them; where there are none, nothing is waited for.

    Args:
        trainer: returns this rank's.

    Attributes:
        region: where this rank is in a run that may lose ranks; those who are in the same one meet where one is lost.
    """

    def __init__(self, trainer: Callable[[], Trainer]) -> None:
        self._trainer = trainer
        self._control: Control | None = None
        self._coordinator: coordinator.Control | None = None  # the same, where there is no server
        self._batches: MeetsForBatches | None = None
        self.region = ""
        self.host = HostedProcess(CoordinatorProcess, "coordinator", needs_secret=False)
        """That of the coordinator through which they meet, unless they do otherwise."""
        self._reported: BaseException | None = None
        self._unexplained: BaseException | None = None  # nobody was found to blame for it

    @property
    def joined(self) -> bool:
        """Whether they can be met."""
        return self._control is not None

    def join(self, control: Control) -> None:
        """Meet them through ``control`` from now on."""
        self.leave(finished=True)  # the training before this one, as LearningRateFinder has it
        self._control = control

    def connect(
        self,
        run: str,
        rank: int,
        topology: Topology,
        main_address: str,
        check: Callable[[], None],
        barrier: Callable[[], None],
        hands_out_batches: bool = False,
        recording: Recording | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        """Meet them through a coordinator of this run, in a process beside rank 0.

        Args:
            run: a name that no other run has, the same on all ranks.
            rank: this one.
            topology: of the run.
            main_address: of rank 0's host.
            check: called while waiting; raises to break off.
            barrier: returns once all ranks have called it.
            hands_out_batches: whether it is to be asked for batches.
            recording: what it records of the run, and replays.
            header: of the record.
        """
        self.leave(finished=True)
        if topology.world_size == 1:
            return
        serve = partial(
            serve_coordinator,
            world_size=topology.world_size,
            main_address=main_address,
            nodes=topology.nodes,
            hands_out_batches=hands_out_batches,
            recording=recording,
            header=header,
        )
        endpoint, credentials = self.host.introduce(run, rank, topology, serve, check)
        self._control = self._coordinator = coordinator.Control(endpoint, credentials, rank, check)
        self.guard(barrier)  # until all have connected
        self.host.end_introduction()

    def leave(self, finished: bool) -> None:
        """Meet them no longer; ``finished``: all is done here, and nothing has failed."""
        control, self._control = self._control, None
        self._coordinator = self._batches = None
        if control is not None:
            control.close(finished)
        self.host.end_introduction()
        self.host.stop(_FAREWELL_S)

    def check(self, fresh: bool = False) -> None:
        """End as another rank has ended, if one has; called again and again while this rank trains or waits."""
        if self._control is not None:
            self.guard(partial(self._control.check, fresh=fresh))

    def come_to(self, place: str) -> None:
        """Let them know that this rank is at ``place``, and will wait for them in :meth:`wait`."""
        if self._control is not None:
            self.guard(partial(self._control.come_to, place, self._detail()))

    def wait(self) -> None:
        """Wait until all have come to the place that this rank has come to."""
        if self._control is not None:
            self.guard(self._control.await_others)
            self._note_meeting()

    def meet(self, place: str) -> None:
        """Wait until all are at ``place``.

        Raises:
            RunFailedError: if one of them has ended, or they are at different places, with those of all.
        """
        if self._control is not None:
            if self._batches is not None:
                self._batches.check_meeting()
            self.guard(partial(self._control.meet, place, self._detail(), self.region))
            self._note_meeting()

    def _note_meeting(self) -> None:
        if self._batches is not None:
            self._batches.has_met()

    # --- batches, which their coordinator hands out -----------------------------------------------------------------

    def hand_out(self, batches: MeetsForBatches) -> None:
        """Let ``batches``, which are requested here, know of every meeting."""
        self._batches = batches

    def request(self, leases: Sequence[int], plan: Plan | None, kept: Sequence[int]) -> Grant:
        """Wait for batches to compute; see :meth:`lightning_stale.coordinator.client.Control.request`."""
        assert self._coordinator is not None
        return self.guard(partial(self._coordinator.request, leases, plan, kept))

    def trained(self) -> dict[str, Any]:
        """Return which batches are committed; also when the run has failed."""
        assert self._coordinator is not None
        return self._coordinator.trained()

    def clock_offset_s(self) -> float:
        """Return what is to be added to this rank's clock to have that of the run, in seconds."""
        return 0.0 if self._coordinator is None else self.guard(self._coordinator.clock_offset_s)

    # --- failures ---------------------------------------------------------------------------------------------------

    def guard(self, call: Callable[[], _T]) -> _T:
        """Run ``call``, which may wait for others; what breaks because of another rank raises what happened there.

        A signal that another rank has received ends this one likewise.
        """
        try:
            return self._blaming(call)
        except RunFailedError as error:
            if error.kind == "sigterm":
                received = self._trainer().received_sigterm  # by this rank itself, and passed on to the others
                of_lightning.note_sigterm(self._trainer())
                raise SIGTERMException from (None if received else error)
            if error.kind == "interrupt":
                raise KeyboardInterrupt from error
            raise

    def report(self, exception: BaseException) -> None:
        """Tell the others that this rank ends with ``exception``, or have it name what ended another one before."""
        told = isinstance(exception, (RunFailedError, ServerLostError))  # by another rank, or nobody is left to tell
        if self._control is None or told or exception is self._reported:
            return
        self._reported = exception
        first = self._control.failure
        kind, text = describe(exception)
        if first is None and exception is not self._unexplained and of_torch.is_lost_connection(exception):
            try:
                self._control.blame()
            except RunFailedError as error:
                first = error
            except SIGTERMException:  # this rank is to end as well; the others hear of what it raises
                first = self._control.failure
        if first is None:
            first = self._control.fail(kind, text)
        if kind == "error":  # and not a signal, which this rank has received, and passed on to who was faster to say so
            exception.__cause__ = exception.__cause__ or first

    def _blaming(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except RuntimeError as error:
            if self._control is not None and of_torch.is_lost_connection(error):
                self._control.blame()
                self._unexplained = error
            raise

    def _detail(self) -> str:
        return f"step {self._trainer().global_step}"


def log_signal(exception: BaseException, rank: int) -> None:
    """Say which signal ends the run, if so, and which rank has received it: Lightning says nothing of a SIGTERM."""
    kind, text = describe(exception)
    if kind != "error":
        told = exception.__cause__
        whose = told if isinstance(told, RunFailedError) else f"rank {rank} {text}"
        log.warning("%s: the run ends, on all ranks", whose)
