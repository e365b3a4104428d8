"""HPSGD in Lightning: workers with a replica each, which train on while the average is on its way."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_stale.averaging.merge import MERGES
from lightning_stale.averaging.rounds import Interval
from lightning_stale.data.loader import why_not
from lightning_stale.events import Recorder
from lightning_stale.events.averaging import AveragingCounts
from lightning_stale.parameter_server.fingerprints import checksum
from lightning_stale.recording.log import EventLog
from lightning_stale.recording.trace import AveragingTrace
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.checks import check_not_elastic
from lightning_stale.strategies.handing_out import WHOLE, Data, check_data, granted, refuse
from lightning_stale.strategies.recorded import Records
from lightning_stale.strategies.updates.averaging import AveragingUpdate, OuterOptimizer


class HPSGDStrategy(StaleStrategy):
    """Each worker trains a replica of its own while the average of the workers' last changes is in flight.

    A round ends when that average has arrived, or after a fixed number of steps; the average goes into the global
    weights, and these into the replica (arXiv 2009.02701). Every local change reaches the global weights exactly once,
    one round late. All workers hold the global weights before validation and checkpoints, at the end of an epoch and at
    the end of ``fit``.

    Args:
        interval: ``"auto"``: a round lasts as long as its exchange; an integer: so many steps.
        outer_optimizer: makes the optimizer of the global weights from their list; the mean change is its gradient.
            ``None``: plain subtraction. ``lambda p: SGD(p, lr=0.7, momentum=0.9, nesterov=True)`` is delayed DiLoCo.
        merge: ``"hpsgd"``: the replica becomes the global weights; ``"cocod"``: and keeps its progress of this round.
        data: ``"auto"``, ``"shards"``: every worker has its own part of an epoch, as in the paper, and the slowest says
            how long it lasts; ``"on-demand"``: whoever is free gets the next batch, so that a slow worker takes fewer
            steps in a round. With a number as ``interval`` all take equally many, whatever their speed.
        record: the path of a file, or ``True`` for ``staleness.record`` in the folder of the log: what decides how the
            run goes on; beside it, a file per rank says how many steps each round had. It is never written over.
        replay: such a file: the run is the recorded one again, bit for bit.
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`.

    Raises:
        ValueError: for an unknown merge rule or way to share data, an interval that is neither ``"auto"`` nor an
            integer >= 1, or ``elastic=``, which needs a parameter server.
        TypeError: for an ``outer_optimizer`` that cannot be called.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import HPSGDStrategy
        >>> strategy = HPSGDStrategy(interval=4)
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
        >>> trainer.strategy
        HPSGDStrategy(interval=4, merge='hpsgd')
    """

    _registered = "hpsgd"
    _entry = "lightning_stale_hpsgd"
    _steps_locally = True

    def __init__(
        self,
        *,
        interval: Interval = "auto",
        outer_optimizer: OuterOptimizer | None = None,
        merge: str = "hpsgd",
        data: Data = "auto",
        record: bool | str | Path = False,
        replay: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_not_elastic(
            kwargs.pop("elastic", False),
            type(self).__name__,
            "its workers average in collectives of all, and what one that dies has learned since is nowhere else",
        )
        if interval != "auto" and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise ValueError(f"interval={interval!r}: write 'auto' or a number of steps >= 1, e.g. interval=4")
        if merge not in list(MERGES):  # also what cannot be hashed
            raise ValueError(f"merge={merge!r} is unknown: write one of {', '.join(map(repr, MERGES))}")
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                f"outer_optimizer={outer_optimizer!r}: write what makes an optimizer from the parameters, e.g. "
                "lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)"
            )
        check_data(data)
        self.data = data
        self._records = Records(record, replay)
        self._update: AveragingUpdate
        super().__init__(update=AveragingUpdate(interval, MERGES[merge], outer_optimizer), **kwargs)
        self.interval, self.merge, self.outer_optimizer = interval, merge, outer_optimizer
        self._counts = AveragingCounts()
        self._summary: dict[str, Any] = {"paradigm": repr(self), "updates": 0, "workers": []}

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank; of the other ranks, as of the last meeting point.

        Returns:
            ``{"paradigm": str, "updates": int, "workers": [...]}``; ``updates`` are rounds. A dict per worker:
            ``rank``, ``steps`` (batches in which an optimizer stepped), ``rounds``, ``steps_per_round``, ``hidden``
            (the share of the exchange in which the worker trained, 0..1), ``wait_s`` and ``compute_s`` (seconds).
        """
        return self._summary

    @property
    def counts(self) -> AveragingCounts:
        """What is counted of this rank, as of now."""
        return self._counts

    # --- training ---------------------------------------------------------------------------------------------------

    def _begin(self, run: str) -> None:
        recording = self._records.next(self._require_trainer())
        header = {**self._header(), "fit": recording.fit} if self.is_global_zero else {}
        if self.is_global_zero:
            recording.check(header)
            if self.world_size == 1 and recording.record is not None:  # there is nobody else to write it
                EventLog(recording.record, header).close()
        self._update.recording = recording
        self._join_others(run, self._update.hands_out_batches, recording, header)
        self._counts = AveragingCounts()
        self._recorder = Recorder(self._counts)
        rank, offset_s = self.global_rank, self._others.clock_offset_s()
        self._traces.begin(self._recorder, rank, self.world_size, lambda file: AveragingTrace(file, rank, offset_s))
        super()._begin(run)

    def _header(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights = {name: checksum(parameter) for name, parameter in self.lightning_module.named_parameters()}
        return {
            "strategy": type(self).__name__,
            "interval": self.interval,
            "merge": self.merge,
            "world_size": self.world_size,
            "on_demand": self._update.hands_out_batches,
            "weights": weights,
        }

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Workers that are granted batches all have the whole order of the epoch."""
        return WHOLE if self._grants_batches() else super().distributed_sampler_kwargs

    def _grants_batches(self) -> bool:
        return self.data == "on-demand" and self.topology.world_size > 1 and self._require_trainer().training

    def process_dataloader(self, dataloader: object) -> object:
        """Let the training loader have the batches that this worker is granted, or its shard."""
        if not self._grants_batches():
            return super().process_dataloader(dataloader)
        trainer, workers = self._require_trainer(), self.topology.world_size
        reason = why_not(dataloader)
        if reason is None and not trainer.lightning_module.automatic_optimization:
            reason = (
                "optimization is manual, and where all meet follows from how often optimizers have stepped: amid "
                "rounds, workers cannot wait for each other to find out"
            )
        if reason is not None:
            raise refuse(reason)
        return granted(dataloader, workers, partial(self._update.hand_out_batches, trainer, workers))

    def meet(self, place: str) -> None:
        """Have all changes of all workers in the weights of each, once all are at ``place``."""
        super().meet(place)
        if self._update.running:
            self._others.guard(self._note_summary)

    def on_train_end(self) -> None:
        super().on_train_end()
        self._end_trace()

    def _note_summary(self) -> None:
        rows: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(rows, self._counts.summary(self.global_rank))
        self._summary = {"paradigm": repr(self), "updates": self._counts.rounds, "workers": rows}

    def __repr__(self) -> str:
        data = "" if self.data == "auto" else f", data={self.data!r}"
        return f"{type(self).__name__}(interval={self.interval!r}, merge={self.merge!r}{data})"
