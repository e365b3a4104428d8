"""Bounded staleness in Lightning: the strategy that wires the parameter server to Lightning's hooks."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_stale.coordinator.connection import CONNECT_TIMEOUT_S, ServerLostError
from lightning_stale.failures import RunFailedError, describe
from lightning_stale.paradigms import PARADIGMS, Paradigm, as_paradigm
from lightning_stale.parameter_server.apply import ApplyRule, Plain, as_apply_rule
from lightning_stale.parameter_server.apply.base import changed_rule_warning
from lightning_stale.parameter_server.client import ParameterClient, Release, Transport
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.private import of_torch
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.exchange import Exchange, unique_parameters
from lightning_stale.transport import address, memory, secret
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.introduction import Introduction
from lightning_stale.transport.layout import Layout
from lightning_stale.transport.wire import WireError

CHECKPOINT_KEY = "lightning_stale"
_T = TypeVar("_T")


class StaleSyncStrategy(StaleStrategy):
    """Data parallelism through a parameter server, with a bound on how far the workers may drift apart.

    Each worker computes the gradient of a batch, pushes it, waits for an OK, and pulls the newest weights. The server,
    a process of its own beside global rank 0, applies each push at once with the user's optimizer (BSP: one step with
    the mean of a round); the paradigm decides when a worker gets its OK. All workers hold the same weights before
    validation and checkpoints, at the end of an epoch and at the end of ``fit``.

    Args:
        paradigm: ``"bsp"``, ``"asp"``, ``"ssp"``, ``"dssp"``, or a paradigm such as ``SSP(threshold=5)``.
        transport: ``"auto"``: shared memory for workers on the server's host, TCP for others; ``"tcp"`` or ``"shm"``
            for all.
        apply: how the server uses a gradient that was computed on older weights: ``"plain"`` (as it is),
            ``"ringmaster"``, ``"delay-compensated"``, ``"dana"``, ``"scaled"``, or an
            :class:`~lightning_stale.ApplyRule` such as ``Ringmaster(R=8)``.
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`: ``start_method``,
            ``process_group_backend``, ``timeout``, ``accelerator``, ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``.

    Raises:
        ValueError: for an unknown paradigm, transport or apply rule, or a rule with a paradigm that has no use for one
            (``"bsp"``).
        TypeError: for a paradigm that is neither a name nor a ``Paradigm``, and likewise for a rule.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import DSSP, StaleSyncStrategy
        >>> strategy = StaleSyncStrategy(paradigm=DSSP(lower=3, upper=15))
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
        >>> trainer.strategy.summary()   # doctest: +NORMALIZE_WHITESPACE
        {'paradigm': 'DSSP(lower=3, upper=15, enforce_upper=True)', 'apply': 'Plain()', 'updates': 0, 'phases': [],
         'workers': []}
    """

    def __init__(
        self,
        *,
        paradigm: str | Paradigm = "dssp",
        transport: Transport = "auto",
        apply: str | ApplyRule = "plain",
        **kwargs: Any,
    ) -> None:
        if transport not in ("auto", "shm", "tcp"):
            raise ValueError(f"transport={transport!r} is unknown: write 'auto', 'shm' or 'tcp'")
        if transport == "shm" and not memory.supported():
            raise ValueError("transport='shm' needs Linux: write transport='auto' or 'tcp'")
        super().__init__(**kwargs)
        self.paradigm = as_paradigm(paradigm)
        self.apply = as_apply_rule(apply, self.paradigm.averages)
        names = [name for name, kind in PARADIGMS.items() if type(self.paradigm) is kind]
        self._registered = names[0] if names else "dssp"
        self.transport = transport
        self._server: ServerProcess | None = None
        self._introduction: Introduction | None = None  # while the ranks connect
        self._client: ParameterClient | None = None
        self._exchange: Exchange | None = None
        self._snapshot: Mapping[str, Any] | None = None  # of the checkpoint that fit resumes from
        self._last_snapshot: Mapping[str, Any] | None = None  # of the server when fit had ended
        self._summary: dict[str, Any] = {
            "paradigm": repr(self.paradigm),
            "apply": repr(self.apply),
            "updates": 0,
            "phases": [],
            "workers": [],
        }

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank, while ``fit`` runs and after it.

        Returns:
            ``{"paradigm": str, "apply": str, "updates": int, "phases": [...], "workers": [...]}``: paradigm and apply
            rule as they are now, with a dict per worker: ``rank``, ``pushes``, ``refused`` (those that the rule did not
            apply), ``max_lead`` and ``mean_lead`` (clocks, at release), ``max_staleness`` and ``mean_staleness``
            (updates, of all pushes), ``wait_s`` and ``compute_s`` (seconds); and one per
            setting of the thresholds, see :meth:`set_thresholds`: ``thresholds``, ``since`` (the updates before it) and
            ``max_lead`` of all workers under it.
        """
        if self._client is not None and self._client.failure is None:
            self._summary = self._client.summary()
        return self._summary

    @property
    def last_release(self) -> Release | None:
        """The last OK of this worker, while ``fit`` runs."""
        return None if self._client is None else self._client.last_release

    def set_thresholds(self, **thresholds: int) -> None:
        """Change thresholds of the paradigm: those of the next ``fit``, or from now on while it runs.

        The call of global rank 0 counts, wherever in training it comes (a callback, ``training_step``); others may make
        it or not. :attr:`paradigm` of the other ranks follows at the next meeting point. Nobody waits for anybody here,
        and a worker that a raised threshold lets go on does so at once; where a threshold falls, workers that are too
        far ahead wait after their next push. A run that resumes from a checkpoint begins with the thresholds that its
        paradigm was made with, unless a :class:`~lightning_stale.ThresholdSchedule` has changed them.

        Args:
            **thresholds: under the names that the paradigm has for them, ``threshold=8`` or ``lower=1, upper=6``; those
                left out stay as they are.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for an impossible value.

        Example::

            >>> from lightning_stale import StaleSyncStrategy
            >>> strategy = StaleSyncStrategy(paradigm="dssp")
            >>> strategy.set_thresholds(upper=6)
            >>> strategy.paradigm
            DSSP(lower=3, upper=6, enforce_upper=True)
        """
        changed = copy.deepcopy(self.paradigm)
        changed.set_thresholds(0.0, **thresholds)
        client = self._client
        if client is not None and not self.is_global_zero:
            return  # they follow from the server, at a meeting point
        if client is not None:
            self._guard(lambda: client.set_thresholds(thresholds))
        self.paradigm = changed

    # --- training ---------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """See that the ranks will trust each other, before they wait for each other."""
        if self._require_trainer().state.fn == TrainerFn.FITTING:
            secret.check(self.num_nodes)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Set up, and let the server process import what it needs meanwhile."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.apply.check(self.optimizers)
            if self.is_global_zero:
                self._server = ServerProcess()

    def on_train_start(self) -> None:
        """Let the server start and connect to it: weights, optimizers and clocks are final by now."""
        super().on_train_start()
        try:
            self.barrier("the start of fit")
        except RuntimeError as error:
            raise RunFailedError("error", "a worker ended before training started; it says why") from error
        endpoint, credentials = self._share_endpoint()
        self._client = ParameterClient(endpoint, credentials, self.global_rank, self.transport, self._check_signals)
        self._meet_at_server("the start of fit", timeout_s=2 * CONNECT_TIMEOUT_S)
        self._end_introduction()
        assert self.lightning_module is not None
        self._exchange = Exchange(
            self._client,
            {id(parameter): name for name, parameter in self.lightning_module.named_parameters()},
            self.optimizers,
            self.root_device,
            self.precision_plugin,
            averages=self.paradigm.averages,
            alone=self.world_size == 1,
            whole=self.lightning_module.automatic_optimization,
            guard=self._guard,
        )
        for optimizer in self.optimizers:
            optimizer.state.clear()  # it lives in the server now
        self._snapshot = self._last_snapshot = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the time until the next push count as computing."""
        if self._client is not None:
            self._client.start_computing()

    def after_batch(self) -> None:
        """Pull the weights that other optimizers' losses may have needed until now."""
        if self._exchange is not None:
            self._exchange.after_batch()

    def on_validation_end(self) -> None:
        """Weights that a callback has swapped for validation, and back, are not a change."""
        if self._exchange is not None:
            self._exchange.remember()

    def on_train_end(self) -> None:
        """Take the optimizer state back, and let the server end."""
        super().on_train_end()
        client = self._require_client()
        if self.is_global_zero:  # which saves
            self._take_back_optimizers()
            self._last_snapshot = client.snapshot()
        self.summary()
        self._release_model()
        client.close(finished=True)
        self._client = None
        if self._server is not None:
            self._server.stop()  # once all workers have said goodbye
            self._server = None

    def teardown(self) -> None:
        """End what is left after a failure; the model keeps the weights it has."""
        if self._exchange is not None and self.is_global_zero:
            try:
                self._require_client().begin_to_end()
                self._take_back_optimizers()
            except (ServerLostError, RunFailedError, WireError) as error:
                rank_zero_warn(
                    f"the state of the optimizers is lost with the parameter server, where it was: {error}. What is "
                    "saved now lacks it: resume from the last checkpoint."
                )
        self._release_model()
        if self._client is not None:
            self._client.close(finished=False)
            self._client = None
        if self._server is not None:
            self._server.stop(grace_s=1.0)
            self._server = None
        self._end_introduction()
        super().teardown()

    def _take_back_optimizers(self) -> None:
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(self.optimizer_state_of(index))

    def meet(self, place: str) -> None:
        if self._client is None:  # sanity validation, or after fit
            return
        if self._exchange is not None:
            self._exchange.look_for_changes()
        self._meet_at_server(place)
        if self._exchange is not None:
            self._exchange.spread()
        self._agree_on_buffers()

    def _meet_at_server(self, place: str, **options: Any) -> None:
        client, step = self._require_client(), self._require_trainer().global_step
        thresholds = self._guard(lambda: client.meet(place, f"step {step}", **options))
        if thresholds != self.paradigm.thresholds:  # rank 0 has changed them
            self.paradigm = copy.deepcopy(self.paradigm)
            self.paradigm.set_thresholds(0.0, **thresholds)

    def report(self, exception: BaseException) -> None:
        client = self._client
        if client is None or client.failure is not None or isinstance(exception, ServerLostError):
            return  # nobody to tell, or told by the server
        kind, text = describe(exception)
        cause = client.abort(kind, text)
        if kind == "error":  # and not a signal, which this rank has received, and passed on to who was faster to say so
            exception.__cause__ = exception.__cause__ or cause

    def _told(self) -> RunFailedError | None:
        if self._client is None:
            return None
        with suppress(ServerLostError, WireError):
            self._client.summary()  # the server tells a failure before it answers
        return self._client.failure

    def _before_collective(self, name: str, group: Any | None = None) -> None:
        """Meet at the server first: it tells workers that are at different places, or one of which has failed.

        The collective itself would wait for its timeout, or speak of a broken connection.
        """
        if self._client is None or self.world_size == 1 or group is not None or self._require_trainer().interrupted:
            return
        self._meet_at_server(f"a collective operation ({name})", pull=False)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, after all workers have met; without waiting where the run has been interrupted."""
        if self._client is not None:
            if self._require_trainer().interrupted:
                if self._exchange is not None:
                    self._exchange.look_for_changes()
                self._client.pull()
                if self._exchange is not None:
                    self._exchange.spread()
            else:
                self.meet("a checkpoint")
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of ``optimizer`` on rank 0, which saves it, and nothing on the others."""
        if self._client is None:
            return super().optimizer_state(optimizer)
        if not self.is_global_zero:
            return {}
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        index = next(i for i, candidate in enumerate(self.optimizers) if candidate is raw)
        return self.optimizer_state_of(index)

    def optimizer_state_of(self, index: int) -> dict[str, Any]:
        """Return ``state_dict()`` of an optimizer: the server's, with the param groups as they are here."""
        theirs, mine = self._require_client().optimizer_state(index), self.optimizers[index].state_dict()
        groups: list[dict[str, Any]] = [dict(group) for group in mine.get("param_groups", [])]
        for group, kept in zip(groups, theirs.pop("param_groups"), strict=False):  # a group added here is an error soon
            group.update(kept)
        return {**mine, **theirs, "param_groups": groups} if mine else mine

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save an ordinary Lightning checkpoint, with the clocks in an entry of its own."""
        if self.is_global_zero and "optimizer_states" in checkpoint:
            snapshot = self._last_snapshot if self._client is None else self._client.snapshot()
            if snapshot is not None:
                checkpoint[CHECKPOINT_KEY] = snapshot
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state that the server will start from, and the clocks if there are any."""
        super().load_optimizer_state_dict(checkpoint)
        self._snapshot = checkpoint.get(CHECKPOINT_KEY)
        warning = changed_rule_warning(self.apply, None if self._snapshot is None else self._snapshot.get("apply"))
        if warning is not None:
            rank_zero_warn(warning)

    # --- the server -------------------------------------------------------------------------------------------------

    def _share_endpoint(self) -> tuple[Endpoint, Credentials]:
        run = self.broadcast(uuid.uuid4().hex)
        self._introduction = Introduction(
            of_torch.rendezvous_store(), run, self.global_rank, others=self.world_size - 1
        )
        if self.is_global_zero:
            return self._introduction.offer(self._start_server)
        return self._introduction.accept(self._check_signals)

    def _end_introduction(self) -> None:
        if self._introduction is not None:
            self._introduction.close()
            self._introduction = None

    def _start_server(self, credentials: Credentials) -> Endpoint:
        assert self.cluster_environment is not None
        parameters = unique_parameters(self.optimizers)
        layout = Layout.of(parameters)
        host, reached_at = address.choose(self.cluster_environment.main_address, self.num_nodes)
        if self._server is None:  # the second training of one fit, as LearningRateFinder does it
            self._server = ServerProcess()
        port = self._server.serve(
            parameters,
            self.optimizers,
            self.paradigm,
            self.world_size,
            credentials,
            host=host,
            folder=self._choose_folder(layout),
            local_workers=self.num_processes if self._shares_memory() else 0,
            snapshot=self._snapshot,
            apply=self.apply,
        )
        return Endpoint(
            address=f"tcp://{reached_at}:{port}",
            host_id=memory.host_id(),
            pid=self._server.pid,
            layout=layout.to_message(),
        )

    def _shares_memory(self) -> bool:
        return self.transport != "tcp" and memory.supported()

    def _choose_folder(self, layout: Layout) -> str:
        if not self._shares_memory():
            return ""
        folder, warning = memory.choose_folder(2 * layout.nbytes * self.num_processes)
        if warning is not None:
            rank_zero_warn(warning)
        return folder

    def _release_model(self) -> None:
        if self._exchange is not None:
            self._exchange.release()
            self._exchange = None

    def _require_client(self) -> ParameterClient:
        assert self._client is not None
        return self._client

    def __repr__(self) -> str:
        apply = "" if type(self.apply) is Plain else f", apply={self.apply!r}"
        return f"{type(self).__name__}(paradigm={self.paradigm!r}, transport={self.transport!r}{apply})"
