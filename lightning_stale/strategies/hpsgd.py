"""HPSGD in Lightning: training goes on while the average is on its way."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_stale.averaging.merge import MERGES
from lightning_stale.averaging.reducer import ProcessGroupReducer
from lightning_stale.averaging.rounds import Interval, Rounds
from lightning_stale.strategies.exchange import unique_parameters
from lightning_stale.strategies.peers import PeerStrategy
from lightning_stale.strategies.places import Places
from lightning_stale.transport.groups import FOREVER, break_off, destroy, new_group

CHECKPOINT_KEY = "lightning_stale_hpsgd"
OuterOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]


class HPSGDStrategy(PeerStrategy):
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
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`.

    Raises:
        ValueError: for an unknown merge rule, or an interval that is neither ``"auto"`` nor an integer >= 1.
        TypeError: for an ``outer_optimizer`` that cannot be called.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import HPSGDStrategy
        >>> strategy = HPSGDStrategy(interval=4)
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
        >>> trainer.strategy
        HPSGDStrategy(interval=4, merge='hpsgd')
    """

    _steps_locally = True

    _registered = "hpsgd"

    def __init__(
        self,
        *,
        interval: Interval = "auto",
        outer_optimizer: OuterOptimizer | None = None,
        merge: str = "hpsgd",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if interval != "auto" and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise ValueError(f"interval={interval!r}: write 'auto' or a number of steps >= 1, e.g. interval=4")
        if merge not in list(MERGES):  # also what cannot be hashed
            raise ValueError(f"merge={merge!r} is unknown: write one of {', '.join(map(repr, MERGES))}")
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                f"outer_optimizer={outer_optimizer!r}: write what makes an optimizer from the parameters, e.g. "
                "lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)"
            )
        self.interval, self.merge, self.outer_optimizer = interval, merge, outer_optimizer
        self._rounds: Rounds | None = None
        self._places: Places | None = None
        self._group: dist.ProcessGroup | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._ended: dict[str, Any] | None = None  # the outer optimizer when fit had ended, or failed
        self._training_since: float | None = None
        self._compute_s = 0.0  # between meeting points, without waiting for the end of a round
        self._stepped = False  # in this batch
        self._held = 0  # parameters, when fit started
        self._summary: dict[str, Any] = {"paradigm": repr(self), "updates": 0, "workers": []}

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank; of the other ranks, as of the last meeting point.

        Returns:
            ``{"paradigm": str, "updates": int, "workers": [...]}``; ``updates`` are rounds. A dict per worker:
            ``rank``, ``steps`` (batches in which an optimizer stepped), ``rounds``, ``steps_per_round``, ``hidden``
            (the share of the exchange in which the worker trained, 0..1), ``wait_s`` and ``compute_s`` (seconds).
        """
        return self._summary

    # --- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin the first round from weights that are the same on all workers."""
        super().on_train_start()
        if not unique_parameters(self.optimizers):
            raise MisconfigurationException(
                "configure_optimizers() returned no optimizer, and HPSGD averages what optimizers change: return one, "
                "or write Trainer(strategy='ddp')"
            )
        self._places = Places(self._start_health(), self.global_rank, self.world_size)
        self._group = new_group(range(self.world_size), self.timeout)
        self._group.set_timeout(FOREVER)  # a sum waits for the slowest worker, and whether it lives is known otherwise
        atexit.register(self._break_off)
        reducer = ProcessGroupReducer(self._group, self.root_device, self._check_peers)
        parameters = unique_parameters(self.optimizers)
        self._held = len(parameters)
        self._rounds = Rounds(
            parameters,
            reducer,
            self.world_size,
            self.interval,
            MERGES[self.merge],
            self.outer_optimizer,
        )
        if self._resumed is not None:
            self._resume(self._rounds.outer, self._resumed["outer"])
        self._resumed = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the time from here to the next meeting point count as training."""
        if self._training_since is None:
            self._training_since = time.monotonic()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Take the local step."""
        self._stepped = True
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def after_batch(self) -> None:
        """End the round if it is time; not earlier: manual optimization may hold a graph over the weights."""
        if self._rounds is not None and self._stepped:
            waited_s = self._rounds.statistics.wait_s
            self._guard(self._rounds.after_step)
            self._compute_s -= self._rounds.statistics.wait_s - waited_s
        self._stepped = False
        self._check_peers()

    def meet(self, place: str) -> None:
        if self._rounds is None:
            return
        if self._training_since is not None:
            self._compute_s += time.monotonic() - self._training_since
            self._training_since = None
        parameters = unique_parameters(self.optimizers)
        if len(parameters) != self._held:
            raise MisconfigurationException(
                f"{', '.join(type(optimizer).__name__ for optimizer in self.optimizers)} had {self._held} parameters "
                f"when fit started and has {len(parameters)} now, which would not be averaged: give it all parameters "
                "in configure_optimizers and freeze them with requires_grad=False until they are to learn"
            )
        self._come_to(place)
        self._guard(self._flush)

    def _flush(self) -> None:
        assert self._rounds is not None
        assert self._places is not None
        self._rounds.flush()
        self._places.await_others()
        self._agree_on_buffers()
        self._note_summary()

    def _before_collective(self, name: str, group: Any | None = None) -> None:
        """Meet first: the collective itself would wait for its timeout, or speak of a broken connection."""
        if self._places is None or self.world_size == 1 or group is not None or self._require_trainer().interrupted:
            return
        self._come_to(f"a collective operation ({name})")
        self._guard(self._places.await_others)

    def _come_to(self, place: str) -> None:
        assert self._places is not None
        come, step = self._places.come_to, self._require_trainer().global_step
        self._guard(lambda: come(place, step))

    def _note_summary(self) -> None:
        assert self._rounds is not None
        counted = self._rounds.statistics
        row = {
            "rank": self.global_rank,
            "steps": counted.steps,
            "rounds": counted.rounds,
            "steps_per_round": counted.steps / max(1, counted.rounds),
            "hidden": 1 - counted.wait_s / max(counted.exchange_s, 1e-9),
            "wait_s": counted.wait_s,
            "compute_s": self._compute_s,
        }
        rows: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(rows, row)
        self._summary = {"paradigm": repr(self), "updates": counted.rounds, "workers": rows}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the global weights, after all workers have met; this worker's replica if the run was interrupted."""
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.interrupted:
            self.meet("a checkpoint")
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save an ordinary Lightning checkpoint, with the outer optimizer in an entry of its own."""
        entry = self._ended if self._rounds is None else self._outer_state()
        if entry is not None and "optimizer_states" in checkpoint:
            checkpoint[CHECKPOINT_KEY] = entry
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the inner optimizers, and the outer one if there is any."""
        super().load_optimizer_state_dict(checkpoint)
        self._resumed = checkpoint.get(CHECKPOINT_KEY)

    @staticmethod
    def _resume(outer: Optimizer | None, state: dict[str, Any] | None) -> None:
        if outer is not None and state is not None:
            outer.load_state_dict(state)
        elif outer is not None:
            rank_zero_warn("the checkpoint has no state of an outer optimizer: this one starts anew")
        elif state is not None:
            rank_zero_warn(
                "the checkpoint has the state of an outer optimizer, and there is none now: it is left out. To go on "
                "with it, write HPSGDStrategy(outer_optimizer=...) as before"
            )

    def _outer_state(self) -> dict[str, Any]:
        assert self._rounds is not None
        outer = self._rounds.outer
        return {"outer": None if outer is None else outer.state_dict()}

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Forget the rounds; the model holds the global weights."""
        super().on_train_end()
        self._end_rounds()
        self._end_group()

    def teardown(self) -> None:
        """Stop what is left."""
        self._end_rounds()
        self._break_off()
        self._places = None
        super().teardown()

    def _break_off(self) -> None:
        """Do not wait for a sum in flight: a worker that has ended may never have begun it."""
        if self._group is not None:
            break_off(self._group)
            self._end_group()

    def _end_group(self) -> None:
        atexit.unregister(self._break_off)
        group, self._group = self._group, None
        if group is not None:
            destroy(group)

    def _end_rounds(self) -> None:
        if self._rounds is not None:
            self._ended = self._outer_state()
            self._rounds = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(interval={self.interval!r}, merge={self.merge!r})"
