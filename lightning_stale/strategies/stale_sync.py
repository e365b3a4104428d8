"""Bounded staleness in Lightning: workers with a replica each, and a parameter server that updates them."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_stale.data.loader import why_not, with_shards
from lightning_stale.data.on_demand import why_rather_not
from lightning_stale.elastic import Elastic, as_elastic
from lightning_stale.failures import RunFailedError
from lightning_stale.paradigms import ASP, PARADIGMS, BoundedDelay, Paradigm, as_paradigm
from lightning_stale.parameter_server.apply import ApplyRule, Plain, as_apply_rule
from lightning_stale.parameter_server.client import Release, Transport
from lightning_stale.parameter_server.process import ServerProcess
from lightning_stale.strategies.handing_out import WHOLE, Data, check_data, granted, refuse
from lightning_stale.strategies.hosted_process import HostedProcess
from lightning_stale.strategies.joinable import JoinableStrategy
from lightning_stale.strategies.recorded import Records
from lightning_stale.strategies.updates.server import ServerUpdate
from lightning_stale.transport import memory


class StaleSyncStrategy(JoinableStrategy):
    """Data parallelism through a parameter server, with a bound on how far the workers may drift apart.

    Each worker computes the gradient of a batch, pushes it, waits for an OK, and pulls the newest weights. The server,
    a process of its own beside global rank 0, applies each push at once with the user's optimizer (BSP: one step with
    the mean of a round); the paradigm decides when a worker gets its OK. All workers hold the same weights before
    validation and checkpoints, at the end of an epoch and at the end of ``fit``.

    Args:
        paradigm: ``"bsp"``, ``"asp"``, ``"ssp"``, ``"dssp"``, ``"bounded-delay"``, or a paradigm such as
            ``SSP(threshold=5)``.
        transport: ``"auto"``: shared memory for workers on the server's host, TCP for others; ``"tcp"`` or ``"shm"``
            for all.
        apply: how the server uses a gradient that was computed on older weights: ``"plain"`` (as it is),
            ``"ringmaster"``, ``"delay-compensated"``, ``"dana"``, ``"scaled"``, or an
            :class:`~lightning_stale.ApplyRule` such as ``Ringmaster(R=8)``.
        data: ``"on-demand"``: whoever is free gets the next batch of the epoch; ``"shards"``: every worker has its own
            part of it, and an epoch lasts as long as the slowest takes for its own; ``"auto"``: on demand with
            ``"bounded-delay"`` and ``"asp"``, wherever Lightning chooses the order of the training data, and otherwise
            shards.
        elastic: what happens when a worker is killed or hangs: ``False``: the run ends; ``True``, or an
            :class:`~lightning_stale.Elastic` that says more: its batches go to the others, which go on without it, and
            another process takes its place. Batches are handed out on demand then, whatever the paradigm.
        record: the path of a file, or ``True`` for ``staleness.record`` in the folder of the log: in which order and
            when the messages of the workers came, who was released and granted what, who came and was lost, and a
            checksum of each gradient. It is never written over: where it exists, its name gets a number.
        replay: such a file: the fit takes all messages in its order, and is the recorded one again bit for bit; where
            it cannot be, it ends, and says which push was the first to differ.
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`: ``start_method``,
            ``process_group_backend``, ``timeout``, ``accelerator``, ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``.

    Raises:
        ValueError: for an unknown paradigm, transport, apply rule or way to share data, a rule with a paradigm that
            has no use for one (``"bsp"``), ``elastic`` with shards or another ``start_method`` than ``"popen"``, or a
            ``replay`` that is no record.
        TypeError: for a paradigm that is neither a name nor a ``Paradigm``, and likewise for a rule and ``elastic``.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import DSSP, StaleSyncStrategy
        >>> strategy = StaleSyncStrategy(paradigm=DSSP(lower=3, upper=15))
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
        >>> trainer.strategy.summary()   # doctest: +NORMALIZE_WHITESPACE
        {'paradigm': 'DSSP(lower=3, upper=15, enforce_upper=True)', 'thresholds': {'lower': 3, 'upper': 15},
         'apply': 'Plain()', 'updates': 0, 'joins': 0, 'leaves': 0, 'taken_back': 0, 'phases': [], 'workers': []}
    """

    _entry = "lightning_stale"

    def __init__(
        self,
        *,
        paradigm: str | Paradigm = "dssp",
        transport: Transport = "auto",
        apply: str | ApplyRule = "plain",
        data: Data = "auto",
        elastic: bool | Elastic = False,
        record: bool | str | Path = False,
        replay: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if transport not in ("auto", "shm", "tcp"):
            raise ValueError(f"transport={transport!r} is unknown: write 'auto', 'shm' or 'tcp'")
        if transport == "shm" and not memory.supported():
            raise ValueError("transport='shm' needs Linux: write transport='auto' or 'tcp'")
        check_data(data)
        self.data = data
        self.elastic = as_elastic(elastic)
        self._patience = None if self.elastic is None else timedelta(seconds=self.elastic.patience_s)
        self._check_elastic(kwargs.get("start_method", "popen"))
        self._records = Records(record, replay)
        self._update: ServerUpdate
        gate = as_paradigm(paradigm)
        self.apply = as_apply_rule(apply, gate.averages)
        super().__init__(update=ServerUpdate(gate, transport, self.apply, self.elastic), **kwargs)
        names = [name for name, kind in PARADIGMS.items() if type(self.paradigm) is kind]
        self._registered = names[0] if names else "dssp"
        self.transport = transport
        self._summary: dict[str, Any] | None = None  # of the last fit, here or in processes that it has started

    def _check_elastic(self, start_method: str) -> None:
        if self.elastic is not None and self.data == "shards":
            raise ValueError(
                "elastic= with data='shards': what a worker that dies has not trained of its shard would be lost. "
                "Write data='auto', or elastic=False"
            )
        if self.elastic is not None and start_method != "popen":
            raise ValueError(
                f"elastic= with start_method={start_method!r}: torch.multiprocessing ends all workers when one dies. "
                "Write start_method='popen' in a script, or elastic=False"
            )

    @property
    def paradigm(self) -> Paradigm:
        """The gate, with the thresholds of now."""
        return self._update.paradigm

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank, while ``fit`` runs and after it.

        Returns:
            ``{"paradigm": str, "thresholds": dict, "apply": str, "updates": int, "joins": int, "leaves": int,
            "taken_back": int, "phases": [...], "workers": [...]}``:
            paradigm, its thresholds (of bounded delay, the delay in force) and apply rule as they are now, or when
            ``fit`` ended; how many workers have joined while it ran, how many were lost, and how many leases of
            batches were taken back from those; a dict per worker: ``rank``, ``pushes``, ``refused`` (those that the
            rule did not apply), ``max_lead`` and ``mean_lead`` (clocks, at release), ``max_staleness`` and
            ``mean_staleness`` (updates, of all pushes), ``wait_s`` and ``compute_s`` (seconds), ``leases`` (how many
            steps' batches were handed out to it) and ``taken_back`` (how many of these went to others), ``leads`` and
            ``staleness`` (how often each came; those from 64 on are rounded down, by at most 3 %); and one per setting
            of the thresholds, see :meth:`set_thresholds`: ``thresholds``, ``since`` (the updates before it) and
            ``max_lead`` of all workers under it.
        """
        self._summary = self._update.summary() or self._summary
        return self._summary or {
            "paradigm": repr(self.paradigm),
            "thresholds": self.paradigm.thresholds,
            "apply": repr(self.apply),
            "updates": 0,
            "joins": 0,
            "leaves": 0,
            "taken_back": 0,
            "phases": [],
            "workers": [],
        }

    @property
    def last_release(self) -> Release | None:
        """The last OK of this worker, while ``fit`` runs."""
        return self._update.last_release

    @property
    def held_leases(self) -> int | None:
        """How many leases of batches this worker holds, while ``fit`` runs; ``None`` where none are handed out."""
        return self._update.held_leases

    def set_thresholds(self, **thresholds: int) -> None:
        """Change thresholds of the paradigm: those of the next ``fit``, or from now on while it runs.

        The call of global rank 0 counts, wherever in training it comes (a callback, ``training_step``); others may make
        it or not. :attr:`paradigm` of the other ranks follows at the next meeting point. Nobody waits for anybody here,
        and a worker that a raised threshold lets go on does so at once; where a threshold falls, workers that are too
        far ahead wait after their next push. A run that resumes from a checkpoint begins with the thresholds that its
        paradigm was made with, unless a :class:`~lightning_stale.ThresholdSchedule` has changed them.

        Args:
            **thresholds: under the names that the paradigm has for them, ``threshold=8``, ``lower=1, upper=6`` or
                ``delay=8``; those left out stay as they are.

        Raises:
            ValueError: if the paradigm has no such thresholds, or for an impossible value.

        Example::

            >>> from lightning_stale import StaleSyncStrategy
            >>> strategy = StaleSyncStrategy(paradigm="dssp")
            >>> strategy.set_thresholds(upper=6)
            >>> strategy.paradigm
            DSSP(lower=3, upper=6, enforce_upper=True)
        """
        self._update.set_thresholds(self.is_global_zero, **thresholds)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def _host(self) -> HostedProcess[ServerProcess]:
        return self._update.host

    def _connects(self, trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING  # one worker has a server too

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Workers that are granted batches all have the whole order of the epoch."""
        if self._grants_batches():
            return WHOLE
        return super().distributed_sampler_kwargs

    def _grants_batches(self) -> bool:
        by_itself = isinstance(self.paradigm, (ASP, BoundedDelay))
        wanted = self.data == "on-demand" or (self.data == "auto" and by_itself)
        if self.elastic is None and (not wanted or self.topology.world_size == 1):
            return False
        return self._require_trainer().training

    def process_dataloader(self, dataloader: object) -> object:
        """Let the training loader have the batches that this worker is granted, or its shard."""
        trainer = self._require_trainer()
        if not self._grants_batches():
            return super().process_dataloader(dataloader)
        reason = why_not(dataloader)
        workers = self.topology.world_size  # an epoch is as long as it began, whoever comes and goes
        if reason is None and self.data == "auto" and self.elastic is None:
            reason = why_rather_not(trainer, cast(DataLoader[Any], dataloader), workers)
        if reason is None:
            joined, before_segment = self.joined_batches, self.before_segment
            hand_out = partial(
                self._update.hand_out_batches, trainer, workers, joined=joined, before_segment=before_segment
            )
            return granted(dataloader, workers, hand_out)
        if self.elastic is not None:
            raise MisconfigurationException(
                f"elastic={self.elastic!r} hands out batches, so that none is lost with a worker, but {reason}: write "
                "elastic=False"
            )
        if self.data == "on-demand":
            raise refuse(reason)
        unbounded = f", so that {self.paradigm!r} bounds nothing" if isinstance(self.paradigm, BoundedDelay) else ""
        rank_zero_info(f"Every worker has training data of its own{unbounded}: {reason}.")
        return with_shards(dataloader, super().distributed_sampler_kwargs)

    def setup(self, trainer: Trainer) -> None:
        """Set up, and leave clipping to the server where it steps with the mean of a round."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.apply.check(self.optimizers)
        if self.data == "shards" and isinstance(self.paradigm, BoundedDelay) and self.world_size > 1:
            rank_zero_warn(
                f"paradigm={self.paradigm!r} bounds how long a batch that was handed out stays open, and with "
                "data='shards' none is: nobody waits, as with 'asp'. Write data='auto', or paradigm='asp' or 'ssp'."
            )
        if self.paradigm.averages:
            self._clip_with(self._update.note_clipping)

    def trace(self, path: Path, max_events: int) -> None:
        """Have a timeline of the next fit written, see :class:`~lightning_stale.Timeline`."""
        self._records.trace, self._records.trace_events = path, max_events

    def _begin(self, run: str) -> None:
        if self._newcomer is None:
            self._update.recording = self._records.next(self._require_trainer())
        super()._begin(run)

    def on_train_start(self) -> None:
        """Let the server start and connect to it: weights, optimizers and clocks are final by now."""
        try:
            self.barrier("the start of fit")
        except RuntimeError as error:
            raise RunFailedError("error", "a worker ended before training started; it says why") from error
        super().on_train_start()

    def __repr__(self) -> str:
        apply = "" if type(self.apply) is Plain else f", apply={self.apply!r}"
        data = "" if self.data == "auto" else f", data={self.data!r}"
        elastic = "" if self.elastic is None else f", elastic={self.elastic!r}"
        return f"{type(self).__name__}(paradigm={self.paradigm!r}, transport={self.transport!r}{apply}{data}{elastic})"
