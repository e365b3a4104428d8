"""The parameter server takes the steps: here, a step is a push, a wait for the OK, and a pull."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_stale.coordinator.connection import CONNECT_TIMEOUT_S, ServerLostError
from lightning_stale.coordinator.leases import Grant, Plan
from lightning_stale.data.loader import NextBatch
from lightning_stale.data.on_demand import BatchesOnDemand
from lightning_stale.elastic import Elastic
from lightning_stale.failures import RunFailedError
from lightning_stale.paradigms import Paradigm
from lightning_stale.parameter_server.apply import ApplyRule
from lightning_stale.parameter_server.apply.base import changed_rule_warning
from lightning_stale.parameter_server.client import Meeting, ParameterClient, Release, Transport
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.recording.options import Recording
from lightning_stale.strategies.hosted_process import HostedProcess
from lightning_stale.strategies.updates.exchange import Exchange
from lightning_stale.strategies.updates.served_weights import serve_weights
from lightning_stale.strategies.updates.server_control import ServerControl
from lightning_stale.strategies.updates.update import Training, Update
from lightning_stale.transport.wire import WireError

_T = TypeVar("_T")


class ServerUpdate(Update):
    """Pushes gradients to a server of this run.

    Args:
        paradigm: the gate.
        transport: ``"auto"``, ``"shm"`` or ``"tcp"``.
        apply: how the server uses a gradient.
        elastic: what becomes of the run when workers are lost; ``None``: it ends.
    """

    def __init__(
        self, paradigm: Paradigm, transport: Transport, apply: ApplyRule, elastic: Elastic | None = None
    ) -> None:
        self.paradigm = paradigm
        """With the thresholds of now; they follow rank 0's at the meeting points."""
        self.host = HostedProcess(ServerProcess, "parameter server", needs_secret=True)
        self._transport, self._apply = transport, apply
        self._training: Training | None = None
        self._client: ParameterClient | None = None
        self._control: ServerControl | None = None
        self._exchange: Exchange | None = None
        self._batches: BatchesOnDemand | None = None
        self._elastic = elastic
        self.recording = Recording()
        """What is recorded of the training that is about to start, and replayed."""
        self.members: tuple[tuple[int, int], ...] = ()
        """Rank and generation of those who were at the last meeting; none before the first."""
        self._resumed: Mapping[str, Any] | None = None
        self._ended: Mapping[str, Any] | None = None  # the server's entry when training had ended
        self._summary: dict[str, Any] | None = None

    # --- training ---------------------------------------------------------------------------------------------------

    def hand_out_batches(
        self,
        trainer: Trainer,
        workers: int,
        prefetch: int,
        joined: Mapping[str, Any] | None = None,
        before_segment: Callable[[], None] = lambda: None,
    ) -> NextBatch:
        """Let the server hand out batches in the training that is about to start; return what asks for the next.

        Args:
            trainer: of this worker.
            workers: among how many an epoch is shared.
            prefetch: how many batches the loader fetches ahead.
            joined: where in the epoch this worker begins, if it joins a fit that runs.
            before_segment: called before the first request after each meeting.
        """
        if self._batches is None:
            resumed = None if self._resumed is None else self._resumed.get("data")
            self._batches = BatchesOnDemand(
                trainer, workers, self._request_batches, prefetch, resumed, joined, before_segment
            )
        return self._batches.next_batch

    def join(self, run: str, rank: int, check: Callable[[], None]) -> tuple[int, int]:
        """Wait until the fit of ``run`` lets this process in; return its rank and generation.

        Args:
            run: its name.
            rank: whose place it takes; -1: it is a further one.
            check: called while waiting; raises to break off.
        """
        endpoint, credentials = self.host.learn(run, rank, check)
        self._client = ParameterClient(endpoint, credentials, rank, self._transport, check, anew=True)
        return self._client.rank, self._client.generation

    def deposited(self) -> bytes:
        """Return what this process, which has joined, begins with."""
        assert self._client is not None
        return self._client.deposited()

    def segment(self) -> dict[str, Any]:
        """Return where in the epoch all are, who are about to ask for batches."""
        assert self._batches is not None
        return self._batches.segment()

    def deposit(self, state: bytes) -> None:
        """On rank 0: let those in who have come, until all meet next; they begin with ``state``."""
        assert self._client is not None
        self._client.deposit(state)

    def _request_batches(
        self, leases: Sequence[int], plan: Plan | None, kept: Sequence[int] = (), steps: int = 0
    ) -> Grant:
        client = self._client
        assert client is not None
        assert self._exchange is not None
        assert self._training is not None
        self._exchange.look_for_changes()
        grant: Grant = self._training.others.guard(lambda: client.request(leases, plan, kept, steps))
        self._exchange.spread()
        return grant

    def start(self, training: Training) -> None:
        """Let the server begin to serve, and connect to it."""
        self._training = training
        joined = self._client is not None
        client = self._client or self._connect(training)
        self._client, self._control = client, ServerControl(client, self._check_meeting, self._note_meeting)
        training.others.join(self._control)
        self.running = True
        if joined:  # it meets nobody before it has had its first batch
            training.others.guard(client.refresh)
        else:
            self._meet_and_pull("the start of fit", timeout_s=2 * CONNECT_TIMEOUT_S)
        self.host.end_introduction()
        self._exchange = Exchange(
            client,
            {id(parameter): name for name, parameter in training.module.named_parameters()},
            training.optimizers,
            training.device,
            alone=training.topology.world_size == 1 and self._elastic is None,
            whole=training.module.automatic_optimization,
            guard=training.others.guard,
            batches=self._batches,
        )
        for optimizer in training.optimizers:
            optimizer.state.clear()  # it lives in the server now
        self._resumed = self._ended = None

    def _connect(self, training: Training) -> ParameterClient:
        endpoint, credentials = self.host.introduce(
            training.run,
            training.rank,
            training.topology,
            partial(
                serve_weights,
                training=training,
                paradigm=self.paradigm,
                transport=self._transport,
                apply=self._apply,
                snapshot=self._resumed,
                hands_out_batches=self._batches is not None,
                elastic=self._elastic,
                recording=self.recording,
            ),
            training.check_signals,
        )
        return ParameterClient(endpoint, credentials, training.rank, self._transport, training.check_signals)

    def before_batch(self) -> None:
        """Let the time until the next push count as computing."""
        if self._client is not None:
            self._client.start_computing()

    def step(self, take: Callable[[], _T]) -> _T:
        """Run ``take``; a step that has pushed nothing (an overflow, no gradients) has done with its batches too."""
        batches = self._batches
        if batches is not None and batches.manual:
            batches.note_step()
            return take()
        leases = () if batches is None else batches.leases
        result = take()
        if batches is not None and batches.spare:  # an overflow, or no gradients
            batches.took_step(None)
        if batches is not None and leases and batches.leases == leases:
            batches.took_step(None)
        return result

    def after_batch(self) -> None:
        """Pull the weights that other optimizers' losses may have needed until now."""
        if self._batches is not None and self._batches.manual:
            self._batches.end_batch()
        if self._exchange is not None:
            self._exchange.after_batch()

    def after_validation(self) -> None:
        """Weights that a callback has swapped for validation, and back, are not a change."""
        if self._exchange is not None:
            self._exchange.remember()

    def meet(self, place: str) -> None:
        if self._exchange is not None:
            self._exchange.look_for_changes()
        self._meet_and_pull(place)
        if self._exchange is not None:
            self._exchange.spread()

    def recover(self) -> None:
        if self._client is None:
            return
        if self._exchange is not None:
            self._exchange.look_for_changes()
        self._client.pull()
        if self._exchange is not None:
            self._exchange.spread()

    def note_clipping(self, optimizer: Optimizer, value: float, algorithm: GradClipAlgorithmType) -> None:
        """Have the server clip the mean of the round, as DDP does, in the next step of ``optimizer``."""
        if self._exchange is not None:
            self._exchange.note_clipping(optimizer, value, algorithm)

    def set_thresholds(self, leads: bool, **thresholds: int) -> None:
        """Change thresholds of the paradigm.

        Args:
            leads: whether this rank tells the server; on the others, while training runs, they follow at a meeting.
            **thresholds: by name.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for an impossible value.
        """
        changed = copy.deepcopy(self.paradigm)
        changed.set_thresholds(0.0, **thresholds)
        client = self._client
        if client is not None:
            if not leads:
                return
            assert self._training is not None
            self._training.others.guard(lambda: client.set_thresholds(thresholds))
        self.paradigm = changed

    # --- what is known of it ----------------------------------------------------------------------------------------

    @property
    def last_release(self) -> Release | None:
        """The last OK of this worker, while training runs."""
        return None if self._client is None else self._client.last_release

    @property
    def held_leases(self) -> int | None:
        """How many leases of batches this worker holds; ``None`` where none are handed out."""
        return None if self._batches is None else len(self._batches.leases)

    def summary(self) -> dict[str, Any] | None:
        """Return the server's counts, as of now or when it was last asked; ``None`` before training."""
        if self._client is not None and self._client.failure is None:
            self._summary = self._client.summary()
        return self._summary

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the state of ``optimizer`` on rank 0, which saves it, and nothing on the others."""
        if self._client is None or self._training is None:
            return None
        if self._training.rank > 0:
            return {}
        return self.state_of(next(i for i, own in enumerate(self._training.optimizers) if own is optimizer))

    def state_of(self, index: int) -> dict[str, Any]:
        """Return ``state_dict()`` of an optimizer: the server's, with the param groups as they are here."""
        assert self._client is not None
        theirs, mine = self._client.optimizer_state(index), self._optimizers[index].state_dict()
        groups: list[dict[str, Any]] = [dict(group) for group in mine.get("param_groups", [])]
        for group, kept in zip(groups, theirs.pop("param_groups"), strict=False):  # a group added here is an error soon
            group.update(kept)
        return {**mine, **theirs, "param_groups": groups} if mine else mine

    def state_dict(self) -> Mapping[str, Any] | None:
        return self._ended if self._client is None else self._snapshot()

    def _snapshot(self) -> Mapping[str, Any]:
        assert self._client is not None
        snapshot = self._client.snapshot()
        leases = snapshot.pop("leases")
        data = None if self._batches is None else self._batches.state_dict(leases)
        return snapshot if data is None else {**snapshot, "data": data}

    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        self._resumed = entry
        warning = changed_rule_warning(self._apply, None if entry is None else entry.get("apply"))
        if warning is not None:
            rank_zero_warn(warning)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take the optimizer state back, and let the server end."""
        assert self._training is not None
        assert self._client is not None
        if self._training.rank == 0:  # which saves
            self._take_back_optimizers()
            self._ended = self._snapshot()
        self.summary()
        if self.paradigm.adapts and self._summary is not None:  # to those present, and some may have left by now
            self._summary["thresholds"] = self.paradigm.thresholds
        self._leave(finished=True)
        self.host.stop()  # once all workers have said goodbye

    def release(self) -> None:
        if self._exchange is not None and self._training is not None and self._training.rank == 0:
            assert self._client is not None
            try:
                self._client.begin_to_end()
                self._take_back_optimizers()
            except (ServerLostError, RunFailedError, WireError) as error:
                rank_zero_warn(
                    f"the state of the optimizers is lost with the parameter server, where it was: {error}. What is "
                    "saved now lacks it: resume from the last checkpoint."
                )
        self._leave(finished=False)
        self.host.stop(grace_s=1.0)
        self.host.end_introduction()

    def _leave(self, finished: bool) -> None:
        self.running = False
        if self._exchange is not None:
            self._exchange.release()
        if self._client is not None and self._training is not None:
            self._training.others.leave(finished)
        elif self._client is not None:  # it has joined, and could not begin
            self._client.close(finished)
        if self._batches is not None:
            self._batches.release()
        self._exchange = self._client = self._control = self._training = self._batches = None

    def _take_back_optimizers(self) -> None:
        for index, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(self.state_of(index))

    def _meet_and_pull(self, place: str, timeout_s: float = math.inf) -> None:
        assert self._control is not None
        assert self._training is not None
        control, others = self._control, self._training.others
        detail = f"step {self._training.module.trainer.global_step}"
        others.guard(lambda: control.meet_and_pull(place, detail, timeout_s, others.region))

    def _check_meeting(self) -> None:
        if self._batches is not None:
            self._batches.check_meeting()

    def _note_meeting(self, meeting: Meeting) -> None:
        self.members, thresholds = meeting.members, meeting.thresholds
        if self._batches is not None:
            self._batches.has_met()
        if thresholds != self.paradigm.thresholds:  # rank 0 has changed them, or they adapt
            self.paradigm = copy.deepcopy(self.paradigm)
            self.paradigm.follow_thresholds(thresholds)

    @property
    def _optimizers(self) -> Sequence[Optimizer]:
        assert self._training is not None
        return self._training.optimizers
