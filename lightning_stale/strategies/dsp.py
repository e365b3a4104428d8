"""The layer-wise pipeline in Lightning: one replica, cut into blocks with diversely stale parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_stale.events import Recorder
from lightning_stale.events.pipeline import StageCounts, of_all_ranks
from lightning_stale.pipeline.channels.links import Links, stage_mesh
from lightning_stale.pipeline.clipping import clip_per_block
from lightning_stale.pipeline.divided.tensors import without_meta
from lightning_stale.pipeline.partition.model import Split
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.private import of_lightning
from lightning_stale.recording.trace import StageTrace
from lightning_stale.strategies.assembly import Assembly
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.checks import check_not_elastic, check_pipeline
from lightning_stale.strategies.divided_model import DividedModel, Whole, check_callbacks, copied, load_mapped
from lightning_stale.strategies.dsp_options import number_of_stages
from lightning_stale.strategies.results_of_rank_0 import (
    MetricsOfRank0,
    separate_metrics,
    share_results,
    warn_of_gradients,
)
from lightning_stale.strategies.running_pipeline import RunningPipeline
from lightning_stale.strategies.same_batches import SameBatches
from lightning_stale.strategies.updates.local import LocalUpdate
from lightning_stale.topology import Topology
from lightning_stale.transport.groups import gather_everywhere


class DSPStrategy(StaleStrategy):
    """Cuts the layers into a pipeline of blocks, each updated at once, from diversely stale features and gradients.

    In each iteration stage ``k`` runs the forward of batch ``n`` and the backward of batch ``n - m_k``, and takes a
    step (layer-wise staleness ``m``; arXiv 1909.02625, Algorithm 1). There is no bubble and no common clock, and the
    weights depend on ``m`` alone, not on timing. The last stage lives on global rank 0, where loss, logging and
    checkpoints are.

    Args:
        stages: the number of blocks; by default as ``split`` says, or one per device. With one device they are virtual,
            and compute the same.
        staleness: ``"dsp"`` (``m_k = 2(K-1-k)``), ``"minimal"`` (``K-1-k``), ``"bp"`` (0: back-propagation), or ``m``.
        queues: how many features may wait between two stages, one number per stage, the last 0.
        recompute: keep inputs only and run each block again before its backward (the paper's), or keep the graph.
        module: the name of the module to cut; by default the ``nn.Sequential`` with most parameters.
        split: ``"params"`` or ``"time"`` (balanced), integers (where each further block starts among the children of
            the sequential body), or names of submodules that start a block (any model that ``torch.fx`` can trace).
        gather: where the model and its optimizer are whole after a run: on ``"rank0"``, while the other ranks keep
            their part, or on ``"all"`` ranks.
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`.

    Raises:
        ValueError: for values that make no pipeline, with what to write; for ``elastic=``, which needs whole replicas.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import DSPStrategy
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=DSPStrategy(stages=3), logger=False,
        ...                   enable_checkpointing=False)
        >>> trainer.strategy
        DSPStrategy(stages=3, staleness='dsp', split='params')
    """

    _registered = "dsp"

    def __init__(
        self,
        *,
        stages: int | None = None,
        staleness: str | Sequence[int] = "dsp",
        queues: Sequence[int] | None = None,
        recompute: bool = True,
        module: str | None = None,
        split: Split = "params",
        gather: Whole = "rank0",
        **kwargs: Any,
    ) -> None:
        check_not_elastic(
            kwargs.pop("elastic", False),
            type(self).__name__,
            "each rank holds a part of the model that no other has, and without it none can go on",
        )
        super().__init__(update=LocalUpdate(), **kwargs)
        if gather not in ("rank0", "all"):
            raise ValueError(
                f"gather={gather!r}: write 'rank0' (the model is whole on rank 0 after a run, and the others keep "
                "their part) or 'all'"
            )
        stages = number_of_stages(stages, staleness, queues, split)
        self.stages, self.staleness, self.queues, self.recompute = stages, staleness, queues, recompute
        self.module, self.split = module, split
        self.gather = gather
        self._counts = StageCounts()
        self._summary: dict[str, Any] = {"staleness": (), "stages": []}
        self._same: SameBatches | None = None
        self._divided: DividedModel | None = None
        self._assembly: Assembly | None = None
        self._running: RunningPipeline | None = None

    @property
    def topology(self) -> Topology:
        """All ranks hold one replica together."""
        return Topology(self.world_size, stages=self.world_size, nodes=self.num_nodes)

    def _connects(self, trainer: Trainer) -> bool:
        return self.num_nodes * self.num_processes > 1  # to evaluate too

    # --- set-up -----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the other ranks; loaders may be made at any time from now on."""
        super().setup_environment()
        trainer = self._require_trainer()
        self._same = SameBatches(self)
        self._divided = DividedModel(
            trainer.lightning_module, self.topology, self.global_rank, self.root_device, self._collectives
        )
        self._undo_setup.append(of_lightning.use_samplers_as_they_are(trainer))
        self._undo_setup.append(of_lightning.before_loading(trainer, self._before_loading))
        self._undo_setup.append(of_lightning.before_fetching(trainer, self._before_fetching))

    def _before_loading(self) -> None:
        """Meet before validation puts the model in eval mode (what is left is training), and let all draw alike."""
        assert self._same is not None
        trainer = self._require_trainer()
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            trainer.training = True
            self.meet("validation")
            trainer.validating = True
        self._same.agree()

    def _before_fetching(self) -> None:
        if self._running is not None and self._same is not None:
            self._same.follow(self._running.pipeline)

    def setup(self, trainer: Trainer) -> None:
        """Set up, cut the model, and keep only what this rank owns."""
        assert self._same is not None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_pipeline(trainer)
            if self.world_size > 1:
                check_callbacks(trainer)
        stages = self.stages or self.world_size
        self._assembly = Assembly(trainer, stages, self.topology, self.global_rank, self.module, self.split)
        self._same.agree()
        super().setup(trainer)
        self._run_in_pipeline(trainer, self._assembly, self._same)
        after_meeting_points = int(fitting)
        self._add_callback(trainer, MetricsOfRank0(self.meet, self._end_evaluation), after_meeting_points)
        if fitting:
            self._clip_with(self._clip_per_block)

    def process_dataloader(self, dataloader: object) -> object:
        """Have all ranks draw the same samples."""
        if self._same is not None and isinstance(dataloader, DataLoader):
            self._undo_setup.extend(self._same.prepare(dataloader))
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device."""
        if self._same is not None:
            self._same.note_batch(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def check_before_launch(self, trainer: Trainer) -> None:
        super().check_before_launch(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            check_pipeline(trainer)

    def _run_in_pipeline(self, trainer: Trainer, assembly: Assembly, same: SameBatches) -> None:
        module, fitting = trainer.lightning_module, trainer.state.fn == TrainerFn.FITTING
        staleness = Staleness.of(self.staleness, assembly.stages, self.queues)
        owner = assembly.owner()
        stages = assembly.make_stages(staleness, self.recompute, self.precision_plugin.forward_context)
        same.begin(fitting, stale=any(staleness.m))
        connection = self._connect(staleness) if self.world_size > 1 else None
        self._counts = StageCounts()
        self._recorder = Recorder(self._counts)
        if fitting:
            make = partial(StageTrace, offset_s=self._others.clock_offset_s())
            self._traces.begin(self._recorder, self.global_rank, self.world_size, make)
        self._running = RunningPipeline(
            trainer, assembly, stages, same, self._step_with_gradients, connection, self._recorder.record
        )
        self._summary = {"staleness": staleness.m, "stages": of_all_ranks(assembly.rows(), [])}
        self._undo_setup.append(self._running.replace_forward(module, owner))
        if self.world_size > 1:
            assert self._divided is not None
            trained = self.optimizers if fitting else []  # or left from the last fit
            self._undo_setup += self._divided.divide(assembly.owned(), trained, trainer)
            assembly.forget_others()
            self._undo_setup += separate_metrics(module) + share_results(trainer)

    def _connect(self, staleness: Staleness) -> tuple[Links, DeviceMesh]:
        mesh = stage_mesh(self.world_size, self.root_device)
        self._join_others(self._new_run())

        def check(_: int, seems_to_have_ended: bool) -> None:
            self._others.check(fresh=seems_to_have_ended)

        return Links(mesh, staleness, self.root_device, check, self.timeout), mesh

    # --- the model over the ranks -----------------------------------------------------------------------------------

    def model_to_device(self) -> None:
        """Give each rank its part of rank 0's model, on the device."""
        assert self._divided is not None
        assert self._assembly is not None
        self._divided.see_to_values(self.broadcast)
        if self.world_size == 1:
            self._divided.leave_file()
            super().model_to_device()
        else:
            self._divided.place(self._assembly.owned())

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        """Leave it as it is: each rank has got its part of rank 0's."""
        return super()._setup_model(model) if self.world_size == 1 else model

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; the weights and states in it stay in the file where possible, until they are needed."""
        mapped = load_mapped(self.checkpoint_io, checkpoint_path, weights_only)
        return super().load_checkpoint(checkpoint_path, weights_only) if mapped is None else mapped

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights: into the whole model, or in the middle of a run, after a trial, into this rank's part."""
        assert self._divided is not None
        if self._running is None:
            self._divided.load_weights(checkpoint["state_dict"], strict)
        else:
            self._running.draining.forget_batches()
            self._divided.load_own_weights(checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of each optimizer's state."""
        if self._divided is not None and self._divided.is_divided:
            self._divided.load_optimizers(checkpoint["optimizer_states"])
        else:
            super().load_optimizer_state_dict({"optimizer_states": copied(checkpoint["optimizer_states"])})

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole model's weights on rank 0; elsewhere, what other ranks have is on the meta device."""
        divided = self._divided if self._divided is not None and self._divided.is_divided else None
        if divided is not None and self._is_interrupted():
            raise RuntimeError("the run has failed, and a checkpoint needs every stage: resume from the last one")
        self.meet("a checkpoint")
        assert self.lightning_module is not None
        return self.lightning_module.state_dict() if divided is None else divided.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole optimizer's state, in the user's parameter order, on rank 0."""
        raw = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = None if self._divided is None else self._divided.optimizer_state(raw)
        return super().optimizer_state(optimizer) if state is None else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint, with whole modules in it."""
        if self._divided is not None:
            checkpoint = self._divided.complete(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._running is not None
        step = super().training_step
        return self._running.calls.train(lambda: step(*args, **kwargs))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagate the loss where it is, and run the stages' backwards of this iteration."""
        assert self._running is not None
        assert self.lightning_module is not None
        return self._running.backward(
            closure_loss, optimizer, self.lightning_module, self.precision_plugin, *args, **kwargs
        )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        assert self._running is not None
        assert self._assembly is not None
        step = super().optimizer_step
        result = self._running.step(lambda run_batch: step(optimizer, run_batch, model, **kwargs), closure)
        if self.world_size > 1:
            warn_of_gradients(self._require_trainer(), self._assembly.stages)
        return result

    def meet(self, place: str) -> None:
        """Drain the pipeline: every batch has then updated every block once."""
        if self._running is not None and self.lightning_module is not None and self.optimizers:
            self._running.drain(self.optimizers[0], self._require_trainer().accumulate_grad_batches)
            super().meet(place)
            self._note_summary()

    def _step_with_gradients(self) -> Any:
        module = self.lightning_module
        assert module is not None
        step = self.precision_plugin.optimizer_step
        return self._update.step(lambda: step(self.optimizers[0], model=module, closure=lambda: None))

    def _clip_per_block(self, optimizer: Optimizer, value: float, algorithm: GradClipAlgorithmType) -> None:
        assert self._assembly is not None
        by_value = algorithm == GradClipAlgorithmType.VALUE
        clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
        clip_per_block(optimizer, [block.module for block in self._assembly.blocks], lambda group: clip(group, value))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._running is not None
        step = super().validation_step
        return self._running.calls.evaluate(lambda: step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._running is not None
        step = super().test_step
        return self._running.calls.evaluate(lambda: step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._running is not None
        step = super().predict_step
        return self._running.calls.evaluate(lambda: step(*args, **kwargs))

    def _end_evaluation(self) -> None:
        assert self._running is not None
        self._running.pipeline.end_evaluation()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Take the decision of rank 0, where the metrics are."""
        return bool(self.broadcast(decision))

    def _undisturbed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._running is None else self._running.undisturbed()

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Drain, which after a trial run (LearningRateFinder) nobody else has done."""
        super().on_train_end()
        self.meet("the end of fit")
        self._end_trace()

    def teardown(self) -> None:
        """End the channels, put the model together again, and give back what has been replaced."""
        running, self._running = self._running, None
        if running is not None:
            running.end(at_once=self._is_interrupted())
        if self._divided is not None:
            self._divided.join(not self._is_interrupted(), self.gather)
        self._same = self._divided = self._assembly = None
        with nullcontext() if self.lightning_module is None else without_meta(self.lightning_module):
            super().teardown()

    @property
    def counts(self) -> StageCounts:
        """What is counted of this rank's stages, as of now."""
        return self._counts

    def summary(self) -> dict[str, Any]:
        """Return what was counted, on every rank, as of the last meeting point.

        Returns:
            ``{"staleness": m, "stages": [...]}``, a dict per stage: ``stage``, ``parameters``, ``busy_s`` (seconds of
            forwards and backwards in training), ``utilisation`` (their share of the time in which its rank has trained,
            drains included, 0..1), ``wait_features_s`` and ``wait_gradients_s`` (seconds until the neighbour's had
            come), ``wait_to_send_s`` (seconds to pass its own on: the queue there may be full), ``features_queued`` and
            ``gradients_queued`` (how many it found waiting, on average; ``None`` where it receives none: the features
            of a stage in the same process are at hand). On GPUs the seconds are those in which the CPU was kept.
        """
        return self._summary

    def _note_summary(self) -> None:
        mine = self._counts.summary()
        ranks = [mine]
        if self.world_size > 1:
            ranks = self._collectives.run("gather", lambda: gather_everywhere(mine))
        self._summary = {**self._summary, "stages": of_all_ranks(self._summary["stages"], ranks)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(stages={self.stages}, staleness={self.staleness!r}, split={self.split!r})"
