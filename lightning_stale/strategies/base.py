"""What every strategy of this package shares: DDP's processes, without its collectives."""

from __future__ import annotations

import atexit
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_stale.failures import RunFailedError, describe
from lightning_stale.launchers import ScriptLauncher, SummaryLauncher
from lightning_stale.launchers.hydra.job import current_job, destroy_process_group
from lightning_stale.private import of_lightning, of_torch
from lightning_stale.strategies.buffers import Versioned, agree_on_buffers, agree_on_changed
from lightning_stale.strategies.checks import (
    check_batch_norm,
    check_device,
    check_model,
    check_notebook,
    check_optimizers,
    check_trainer,
)
from lightning_stale.strategies.meeting import MeetingPoints
from lightning_stale.strategies.twin import refuse_environment

log = logging.getLogger(__name__)

_T = TypeVar("_T")
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
_PER_BATCH_HOOKS = {"training_step", "on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"}


class StaleStrategy(DDPStrategy):
    """Workers that train without meeting at every batch.

    The launchers, process group, samplers and reductions are those of Lightning's DDP; the model is not wrapped, and no
    collective is left in a training batch. Subclasses say what happens at a meeting point.

    Args:
        start_method: how Lightning starts the workers, as in ``DDPStrategy``.
        process_group_backend: as in ``DDPStrategy``.
        timeout: of a collective, and for the ranks to find each other. In ``fit`` nobody waits for a slow rank in a
            collective, however long it validates or saves, so it can be short.
        accelerator: as in ``DDPStrategy``.
        cluster_environment: as in ``DDPStrategy``.
        checkpoint_io: as in ``DDPStrategy``.
        precision_plugin: as in ``DDPStrategy``.
    """

    _registered = ""
    """The name that stands for it in ``Trainer(strategy=...)``."""
    _steps_locally = False
    """Whether a worker's own optimizer takes its steps, as a plain Trainer would, with gradients that nobody needs."""

    def __init__(
        self,
        *,
        start_method: StartMethod = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=10),
        accelerator: Accelerator | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.timeout = timeout
        self._undo_setup: list[Callable[[], None]] = []
        self._untrained: list[Versioned] = []

    @abstractmethod
    def meet(self, place: str) -> None:
        """Wait until all workers are at ``place``, and have the same weights on all of them."""

    def after_batch(self) -> None:
        """Called after each training batch, outside of the user's ``training_step``."""

    @abstractmethod
    def report(self, exception: BaseException) -> None:
        """Tell the other workers that this one fails with ``exception``."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the counts of the run."""

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        refuse_environment(self.cluster_environment)
        current_job()  # ends what a job before this one has left: it looks as if torchrun had started this process
        super()._configure_launcher()
        if self._start_method == "popen":
            assert self.cluster_environment is not None
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = SummaryLauncher(self, start_method=self._start_method)
        check_notebook(self._launcher.is_interactive_compatible, type(self).__name__, f"{self._registered}_notebook")

    def check_before_launch(self, trainer: Trainer) -> None:
        """Refuse what no rank could run before any of them is started; :meth:`setup` checks it all again."""
        if trainer.state.fn == TrainerFn.FITTING and self.lightning_module is not None:
            check_trainer(trainer)
            check_batch_norm(self.lightning_module, self._layer_sync is not None)

    def setup_environment(self) -> None:
        """Set up the process group as DDP does, and see to it that it is destroyed before the interpreter is.

        Lightning does so for NCCL only; with gloo, torch 2.13 now and then aborts at exit ("terminate called without an
        active exception"), and a worker's exit code then makes Lightning kill the others.
        """
        super().setup_environment()
        atexit.unregister(destroy_process_group)
        atexit.register(destroy_process_group)

    def setup(self, trainer: Trainer) -> None:
        """Check, set up as DDP does, and take the collectives out of the batches."""
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.model is not None
            check_trainer(trainer)
            check_device(self.root_device)
            check_model(self.model, self._layer_sync is not None, self._steps_locally)
        super().setup(trainer)
        self._undo_setup.append(of_lightning.free_batches(trainer))
        if trainer.state.fn == TrainerFn.FITTING:
            if not self._steps_locally:
                check_optimizers(self.optimizers)
            self._add_meeting_points(trainer)
            trained = {
                id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
            }
            self._untrained = [Versioned(p) for p in trainer.lightning_module.parameters() if id(p) not in trained]

    def configure_ddp(self) -> None:
        """Give all workers the same weights to start from, instead of wrapping the model."""
        assert self.model is not None
        of_lightning.broadcast_module(self.model)

    def teardown(self) -> None:
        """Undo :meth:`setup`."""
        while self._undo_setup:
            self._undo_setup.pop()()
        super().teardown()

    def _add_meeting_points(self, trainer: Trainer) -> None:
        callback = MeetingPoints(self)
        callbacks = of_lightning.callbacks(trainer)
        callbacks.insert(0, callback)
        self._undo_setup.append(lambda: callbacks.remove(callback))

    def _agree_on_buffers(self) -> None:
        assert self.lightning_module is not None
        agree_on_buffers(self.lightning_module, self.world_size)
        agree_on_changed(self._untrained, self.world_size)

    # --- failures ---------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Say which signal ends the run, and which rank has received it: Lightning says nothing of a SIGTERM."""
        super().on_exception(exception)
        kind, text = describe(exception)
        if kind != "error" and self.is_global_zero:
            told = exception.__cause__
            whose = told if isinstance(told, RunFailedError) else f"rank {self.global_rank} {text}"
            log.warning("%s: the run ends, on all ranks", whose)

    def _guard(self, call: Callable[[], _T]) -> _T:
        """Run ``call``, which may wait; a signal that another rank has received ends this one likewise."""
        try:
            return call()
        except RunFailedError as error:
            if error.kind == "sigterm":
                received = self._require_trainer().received_sigterm  # by this rank itself, and passed on to the others
                of_lightning.note_sigterm(self._require_trainer())
                raise SIGTERMException from (None if received else error)
            if error.kind == "interrupt":
                raise KeyboardInterrupt from error
            raise

    @contextmanager
    def _ending_alike(self) -> Iterator[None]:
        """Run a collective: where a signal has ended another rank amid it, this one ends so too, and not by an error.

        Of two ranks that have both come to it, one may see the signal before it goes in.
        """
        try:
            yield
        except RuntimeError as error:
            told = self._told() if of_torch.is_lost_connection(error) else None
            if told is None or told.kind == "error":
                raise
            self._guard(partial(_throw, told))

    @abstractmethod
    def _told(self) -> RunFailedError | None:
        """Return why another rank has ended, if that is known by now."""

    def _check_signals(self) -> None:
        if self._require_trainer().received_sigterm:
            raise SIGTERMException

    def _require_trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # --- collectives ------------------------------------------------------------------------------------------------

    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the ranks, as DDP does; within a training batch, warn that this makes the workers meet."""
        self._before_collective("reduce", group)
        logged = isinstance(reduce_op, str)  # and not a decision that a callback takes, such as ModelCheckpoint's
        if logged and self.world_size > 1 and self._in_training_batch():
            rank_zero_warn(
                "self.log(..., on_step=True, sync_dist=True) in a training batch makes all workers meet at every "
                "batch, so that a slow one holds up the others: write sync_dist=False, or on_step=False"
            )
        with self._ending_alike():
            return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        self._before_collective("all_gather", group)
        with self._ending_alike():
            return super().all_gather(tensor, group, sync_grads)

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        self._before_collective("broadcast")
        with self._ending_alike():
            return super().broadcast(obj, src)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._before_collective("barrier")
        with self._ending_alike():
            super().barrier(*args, **kwargs)

    def _before_collective(self, name: str, group: Any | None = None) -> None:
        """Called before all workers (``group``: ``None``) or some of them enter a collective of Lightning's."""

    def _in_training_batch(self) -> bool:
        module: LightningModule | None = self.lightning_module
        return (
            module is not None
            and module._trainer is not None
            and module.trainer.training
            and of_lightning.current_hook(module) in _PER_BATCH_HOOKS
        )


def _throw(error: RunFailedError) -> NoReturn:
    raise error
