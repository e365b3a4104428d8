"""HPSGD in Lightning: training goes on while the average is on its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_stale.averaging.merge import MERGES
from lightning_stale.averaging.reducer import ProcessGroupReducer
from lightning_stale.averaging.rounds import Interval, Rounds
from lightning_stale.strategies.exchange import unique_parameters
from lightning_stale.strategies.peers import PeerStrategy

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
        if merge not in MERGES:
            raise ValueError(f"merge={merge!r} is unknown: write one of {', '.join(map(repr, MERGES))}")
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                f"outer_optimizer={outer_optimizer!r}: write what makes an optimizer from the parameters, e.g. "
                "lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)"
            )
        self.interval, self.merge, self.outer_optimizer = interval, merge, outer_optimizer
        self._rounds: Rounds | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._ended: dict[str, Any] | None = None  # the outer optimizer when fit had ended
        self._training_since: float | None = None
        self._compute_s = 0.0
        self._summary: dict[str, Any] = {"paradigm": repr(self), "updates": 0, "workers": []}

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank; of the other ranks, as of the last meeting point.

        Returns:
            ``{"paradigm": str, "updates": int, "workers": [...]}``; ``updates`` are rounds. A dict per worker:
            ``rank``, ``steps``, ``rounds``, ``steps_per_round``, ``hidden`` (the share of the exchange in which the
            worker trained, 0..1), ``wait_s`` and ``compute_s`` (seconds).
        """
        return self._summary

    # --- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin the first round from weights that are the same on all workers."""
        super().on_train_start()
        others = [rank for rank in range(self.world_size) if rank != self.global_rank]
        health = self._start_health()
        reducer = ProcessGroupReducer(dist.new_group(), self.root_device, lambda: health.check(others))
        self._rounds = Rounds(
            unique_parameters(self.optimizers),
            reducer,
            self.world_size,
            self.interval,
            MERGES[self.merge],
            self.outer_optimizer,
        )
        if self._resumed is not None and self._resumed["outer"] is not None and self._rounds.outer is not None:
            self._rounds.outer.load_state_dict(self._resumed["outer"])
        self._resumed = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the time from here to the next meeting point count as training."""
        if self._training_since is None:
            self._training_since = time.monotonic()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Take the local step, and end the round if it is time."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._rounds is not None:
            self._rounds.after_step()
        return result

    def meet(self, place: str) -> None:
        if self._rounds is None:
            return
        if self._training_since is not None:
            self._compute_s += time.monotonic() - self._training_since
            self._training_since = None
        self._guard(self._rounds.flush)
        self._agree_on_place(place)
        self._agree_on_buffers()
        self._note_summary()

    def _agree_on_place(self, place: str) -> None:
        assert self.lightning_module is not None
        mine = f"{place} (step {self.lightning_module.trainer.global_step})"
        places: list[str] = [""] * self.world_size
        dist.all_gather_object(places, mine)
        if len({text.split(" (")[0] for text in places}) > 1:
            described = "; ".join(f"rank {rank} is at {text}" for rank, text in enumerate(places))
            raise MisconfigurationException(
                f"the workers met at different places: {described}. Validation and checkpoints within an epoch need "
                "the same number of batches on every rank: validate and save at the end of an epoch "
                "(val_check_interval=1.0, every_n_train_steps=None), or write Trainer(limit_train_batches=...)"
            )

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
            "compute_s": self._compute_s - counted.wait_s,
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

    def _outer_state(self) -> dict[str, Any]:
        assert self._rounds is not None
        outer = self._rounds.outer
        return {"outer": None if outer is None else outer.state_dict()}

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Forget the rounds; the model holds the global weights."""
        super().on_train_end()
        if self._rounds is not None:
            self._ended = self._outer_state()
            self._rounds = None

    def teardown(self) -> None:
        """Stop what is left."""
        self._rounds = None
        super().teardown()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(interval={self.interval!r}, merge={self.merge!r})"
