"""What every strategy of this package shares: DDP's processes, without its collectives."""

from __future__ import annotations

import atexit
import uuid
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.events import Recorder
from lightning_stale.launchers import ScriptLauncher, SummaryLauncher
from lightning_stale.launchers.hydra.job import current_job, destroy_process_group
from lightning_stale.private import of_lightning, of_torch, of_torchmetrics
from lightning_stale.recording.options import Recording
from lightning_stale.strategies import checkpoint_entries
from lightning_stale.strategies.buffers import UntrainedState
from lightning_stale.strategies.checks import (
    check_batch_norm,
    check_device,
    check_model,
    check_notebook,
    check_optimizers,
    check_trainer,
)
from lightning_stale.strategies.clipping import Clip, clipping_with
from lightning_stale.strategies.collectives import Collectives, warn_within_batch
from lightning_stale.strategies.hosted_process import HostedProcess
from lightning_stale.strategies.meeting_points import MeetingPoints
from lightning_stale.strategies.other_ranks import OtherRanks, log_signal
from lightning_stale.strategies.present import Members, Present
from lightning_stale.strategies.rank_traces import RankTraces
from lightning_stale.strategies.restart import SavedCheckpoints, begin_fit, is_supervised, where_to_go_on
from lightning_stale.strategies.updates.update import Training, Update
from lightning_stale.strategies.validation import Validation
from lightning_stale.strategies.wrong_package import refuse_environment
from lightning_stale.topology import Topology
from lightning_stale.transport import secret
from lightning_stale.transport.groups import gather_everywhere

_T = TypeVar("_T")
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class StaleStrategy(DDPStrategy):
    """Ranks that train without meeting at every batch.

    The launchers, process group, samplers and reductions are those of Lightning's DDP; the model is not wrapped, and no
    collective is left in a training batch. A subclass says what the ranks are to each other (:attr:`topology`) and how
    weights are updated (an :class:`~lightning_stale.strategies.updates.update.Update`); here, the calls of both are
    wired to Lightning's hooks.

    Args:
        update: how the weights of a rank are updated.
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
    _entry: checkpoint_entries.EntryName | None = None
    """Where the update's state is in a checkpoint."""
    _patience: timedelta | None = None
    """How long a rank may be silent before it is given up, and the run goes on without it; ``None``: none is."""
    _steps_locally = False
    """Whether a worker's own optimizer takes its steps, as a plain Trainer would, with gradients that nobody needs."""

    def __init__(
        self,
        *,
        update: Update,
        start_method: StartMethod = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=10),
        accelerator: Accelerator | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._present = Present()
        super().__init__(
            accelerator=accelerator,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.timeout, self.start_method = timeout, start_method
        self._update = update
        self._others = OtherRanks(self._require_trainer)
        self._collectives = Collectives(self._others, self._may_meet, self._undisturbed, self._present, self._follow)
        self._validation: Validation | None = None  # of a run that may lose ranks
        self._undo_setup: list[Callable[[], object]] = []
        self._untrained: UntrainedState | None = None
        self._recorder = Recorder()  # of what happens on this rank
        self._traces = RankTraces()
        self._saved: SavedCheckpoints | None = None  # by the fit that runs, or has run last

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the counts of the run."""

    def trace(self, path: Path, max_events: int) -> None:
        """Have a timeline of the next fit written, see :class:`~lightning_stale.Timeline`."""
        self._traces.ask(path, max_events)

    def _end_trace(self) -> None:
        def gather(part: bytes) -> list[bytes]:
            if self.world_size == 1:
                return [part]
            parts: list[bytes] = self._collectives.run("gather", lambda: gather_everywhere(part))
            return parts

        self._traces.end(gather, self.is_global_zero)

    @property
    def _host(self) -> HostedProcess[Any]:
        """The process that all ranks connect to."""
        return self._others.host

    def _connects(self, trainer: Trainer) -> bool:
        """Whether they connect to it in this run."""
        return trainer.state.fn == TrainerFn.FITTING and self.num_nodes * self.num_processes > 1

    @property
    def topology(self) -> Topology:
        """What the ranks are to each other: workers with a replica each, unless a subclass says otherwise.

        While a run goes on, it is what they were when it began.
        """
        return Topology(self._present.began_with or self.world_size, nodes=self.num_nodes)

    @property
    def world_size(self) -> int:
        """How many ranks are present."""
        return self._present.world_size or super().world_size

    @property
    def global_rank(self) -> int:
        """Which of those present this one is; 0 stays 0, whoever is lost."""
        return super().global_rank if self._present.index is None else self._present.index

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _check_environment(self) -> None:
        """Refuse, before there is a launcher, to run where this strategy cannot."""
        refuse_environment(self.cluster_environment)

    def _configure_launcher(self) -> None:
        self._check_environment()
        current_job()  # ends what a job before this one has left: it looks as if torchrun had started this process
        super()._configure_launcher()
        if self.start_method == "popen":
            assert self.cluster_environment is not None
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = SummaryLauncher(self, start_method=self.start_method)
        check_notebook(self._launcher.is_interactive_compatible, type(self).__name__, f"{self._registered}_notebook")

    def check_before_launch(self, trainer: Trainer) -> None:
        """Refuse what no rank could run before any of them is started; :meth:`setup` checks it all again."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._saved = begin_fit(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING and self.lightning_module is not None:
            check_trainer(trainer)
            check_batch_norm(self.lightning_module, of_lightning.synchronizes_batch_norm(self))

    def setup_environment(self) -> None:
        """Set up the process group as DDP does, and see to it that it is destroyed before the interpreter is.

        Lightning does so for NCCL only; with gloo, torch 2.13 now and then aborts at exit ("terminate called without an
        active exception"), and a worker's exit code then makes Lightning kill the others.

        That the ranks will trust each other is seen to before they wait for each other, and what they will all connect
        to begins to import what it needs meanwhile.
        """
        if self._connects(self._require_trainer()):
            if self._host.needs_secret:
                secret.check(self.num_nodes)
            if self.node_rank == 0 and self.local_rank == 0:
                self._host.prepare()
        of_torch.end_loaders_with_their_process()
        with of_torch.keys_of_this_attempt():
            super().setup_environment()
        self._present.adopt(super().world_size)
        atexit.unregister(destroy_process_group)
        atexit.register(destroy_process_group)
        self._go_on_after_restart()

    def _go_on_after_restart(self) -> None:
        trainer = self._require_trainer()
        if trainer.state.fn == TrainerFn.FITTING and is_supervised():
            path = where_to_go_on(self._saved if self.is_global_zero else None, self.broadcast)
            if path is not None:
                of_lightning.resume_from(trainer, path)

    def setup(self, trainer: Trainer) -> None:
        """Check, set up, and take the collectives out of the batches."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            assert self.model is not None
            check_trainer(trainer)
            check_device(self.root_device)
            check_model(self.model, of_lightning.synchronizes_batch_norm(self), self._steps_locally)
        super(DDPStrategy, self).setup(trainer)  # which calls _setup_model; DDP's own would wrap the model
        self._undo_setup.append(of_lightning.free_batches(trainer))
        if fitting:
            if not self._steps_locally:
                check_optimizers(self.optimizers)
            self._add_callback(trainer, MeetingPoints(self), 0)
            self._untrained = UntrainedState(trainer.lightning_module, self.optimizers)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        """Give all ranks the same weights to start from, instead of wrapping the model."""
        of_lightning.broadcast_module(model)
        return model

    def teardown(self) -> None:
        """End what is left after a failure, and undo :meth:`setup`."""
        self._update.release()
        self._others.leave(finished=not self._is_interrupted())
        self._present.end(self.timeout)
        while self._undo_setup:
            self._undo_setup.pop()()
        super().teardown()

    def _add_callback(self, trainer: Trainer, callback: Any, position: int) -> None:
        callbacks = of_lightning.callbacks(trainer)
        callbacks.insert(position, callback)
        self._undo_setup.append(lambda: callbacks.remove(callback))

    def _clip_with(self, clip: Clip) -> None:
        plain = self.precision_plugin
        self.precision_plugin = clipping_with(plain, clip)
        self._undo_setup.append(lambda: setattr(self, "precision_plugin", plain))

    # --- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin from weights that are the same on all ranks of a stage."""
        super().on_train_start()
        self._begin(self._new_run())

    def _begin(self, run: str) -> None:
        assert self.cluster_environment is not None
        assert self.lightning_module is not None
        rank = self.global_rank
        if self._patience is not None:
            self._present.begin(run, self._here, rank, self.topology.world_size, self._patience)
        self._update.start(
            Training(
                run=run,
                rank=rank,
                topology=self.topology,
                others=self._others,
                module=self.lightning_module,
                optimizers=self.optimizers,
                device=self.root_device,
                main_address=self.cluster_environment.main_address,
                timeout=self.timeout,
                check_signals=self._check_signals,
                record=self._recorder.record,
            )
        )
        if self._present.elastic:
            self._go_on_without_the_lost()

    @property
    def _here(self) -> Members:
        """Who is in torch's default group as a run begins."""
        return tuple((rank, 1) for rank in range(self.world_size))

    def _go_on_without_the_lost(self) -> None:
        """Let collectives, metrics and validations be of those present, from the first meeting on."""
        trainer = self._require_trainer()
        collective = partial(self._collectives.run, "the gather of a metric")
        self._undo_setup.append(of_torchmetrics.gather_through(collective))
        self._validation = Validation(
            trainer, self._present, self._others, self.meet, self._follow, self._update.after_validation
        )
        self._undo_setup += [self._validation.undo, partial(setattr, self, "_validation", None)]
        self._follow()
        self._form_group()

    def _follow(self) -> None:
        """Note who was at the last meeting."""
        if self._update.members:
            self._present.follow(self._update.members)
        if self._validation is not None:
            self._validation.check()

    def _form_group(self) -> None:
        if not self._present.grouped:
            self._collectives.complete("a group of those present", lambda: None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._update.before_batch()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Take the step, as the update takes it."""
        step = super().optimizer_step
        return self._update.step(lambda: step(optimizer, closure, model, **kwargs))

    def after_batch(self) -> None:
        """Called after each training batch, outside of the user's ``training_step``."""
        self._update.after_batch()

    def meet(self, place: str) -> None:
        """Wait until all ranks are at ``place``, and have the same weights on all of a stage."""
        has_met = self._validation is not None and self._validation.underway and place == "validation"
        if not self._update.running or has_met:
            return
        self._update.meet(place)
        untrained = self._untrained
        if self._present.elastic:
            self._follow()
            if untrained is None or untrained.empty:
                self._form_group()
            else:
                self._collectives.complete("untrained weights", lambda: untrained.agreed(self.world_size))()
        elif untrained is not None and not self.topology.one_replica:
            self._others.guard(lambda: untrained.agreed(self.world_size)())

    def on_validation_end(self) -> None:
        self._update.after_validation()

    def on_train_end(self) -> None:
        super().on_train_end()
        self._update.finish()
        self._present.end(self.timeout)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, after all ranks have met; without waiting where the run has been interrupted."""
        if self._is_interrupted():
            self._update.recover()
        else:
            self.meet("a checkpoint")
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of ``optimizer`` on rank 0, which saves it."""
        raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = self._update.optimizer_state(raw)
        return super().optimizer_state(optimizer) if state is None else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save an ordinary Lightning checkpoint, with an entry of the update's."""
        if self._entry is not None and self.is_global_zero:
            checkpoint_entries.write(checkpoint, self._entry, self._update.state_dict)
        with self._noting(checkpoint, filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def _noting(self, checkpoint: Mapping[str, Any], path: Any) -> AbstractContextManager[None]:
        """Return what a checkpoint is saved in, so that a restart finds it: one that is whole, of a sound run."""
        can_resume = "optimizer_states" in checkpoint and not self._is_interrupted()
        if self._saved is None or not self.is_global_zero or not can_resume:
            return nullcontext()
        returns_early = isinstance(self.checkpoint_io, AsyncCheckpointIO)
        return self._saved.saving(path, checkpoint["global_step"], returns_early)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, and what the update goes on from, if the checkpoint has it."""
        super().load_optimizer_state_dict(checkpoint)
        if self._entry is not None:
            self._update.load_state_dict(checkpoint_entries.read(checkpoint, self._entry))

    # --- failures ---------------------------------------------------------------------------------------------------

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one fails with ``exception``."""
        self._others.report(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Say which signal ends the run, and which rank has received it: Lightning says nothing of a SIGTERM.

        In ``fit`` the other ranks have been told already, before any other callback.
        """
        self.report(exception)
        super().on_exception(exception)
        if self.is_global_zero:
            log_signal(exception, self.global_rank)

    def _check_signals(self) -> None:
        if self._require_trainer().received_sigterm:
            raise SIGTERMException

    def _is_interrupted(self) -> bool:
        trainer = None if self.lightning_module is None else of_lightning.trainer_of(self.lightning_module)
        return trainer is not None and trainer.interrupted

    def _require_trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _new_run(self) -> str:
        """Return a name that no other run has, the same on all ranks."""
        return self.broadcast(uuid.uuid4().hex)

    def _join_others(
        self,
        run: str,
        hands_out_batches: bool = False,
        recording: Recording | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> None:
        """Meet the other ranks, and hear of their failures, without a server; it may hand out batches, and record."""
        assert self.cluster_environment is not None
        address = self.cluster_environment.main_address
        self._others.connect(
            run,
            self.global_rank,
            self.topology,
            address,
            self._check_signals,
            super().barrier,
            hands_out_batches,
            recording,
            header,
        )

    # --- collectives ------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Replicas have samples of their own; the ranks of one replica have the same."""
        if self._present.world_size is not None:
            return {"num_replicas": self._present.world_size, "rank": self._present.index or 0}
        return self.topology.sampler_kwargs(self.global_rank)

    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the replicas, as DDP does; within a training batch, warn that this makes the workers meet."""
        if self.topology.one_replica:
            return tensor
        reduce = super().reduce
        if isinstance(reduce_op, str):  # logged, and not a decision that a callback takes, such as ModelCheckpoint's
            warn_within_batch(self.lightning_module)
        if self._present.elastic and group is None and isinstance(tensor, Tensor):
            reduced = self._collectives.run("reduce", lambda: reduce(tensor.clone(), group, reduce_op))
            with torch.no_grad():
                return tensor.copy_(reduced)
        return self._collectives.run("reduce", lambda: reduce(tensor, group, reduce_op), group)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather over the replicas."""
        if self.topology.one_replica:
            return (tensor if sync_grads else tensor.detach()).unsqueeze(0)
        gather = super().all_gather
        return self._collectives.run("all_gather", lambda: gather(tensor, group, sync_grads), group)

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Send ``obj`` of ``src`` to all ranks, once all are there."""
        broadcast = super().broadcast
        return self._collectives.run("broadcast", lambda: broadcast(obj, src))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait until all ranks are there."""
        barrier = super().barrier
        self._collectives.barrier(lambda: barrier(*args, **kwargs))

    def _may_meet(self) -> bool:
        """Whole replicas go on by themselves after an interruption; the parts of one cannot."""
        if self._present.elastic:  # the only one left may have company again; who joins has none before it has met
            return bool(self._update.members) and not self._is_interrupted()
        return self.world_size > 1 and (not self._is_interrupted() or self.topology.stages > 1)

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Return what a collective runs in that nothing else on the device may meet."""
        return nullcontext()
