"""The layer-wise pipeline in Lightning: an unmodified module, cut into blocks with diversely stale parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_stale.pipeline.clipping import clip_per_block
from lightning_stale.pipeline.links import link_stages, stage_mesh
from lightning_stale.pipeline.ownership import constant_names, materialize, own_names, put_back
from lightning_stale.pipeline.part import Part
from lightning_stale.pipeline.partition import count_parameters
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Block, Stage, check_disjoint, tensors
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.strategies import internals
from lightning_stale.strategies.alike import Alike
from lightning_stale.strategies.cut import Split, cut_model, outside, positional
from lightning_stale.strategies.relay import MetricsRelay
from lightning_stale.strategies.replica import SingleReplicaStrategy


class _StageDoneError(Exception):
    """Ends a step on a rank without the last stage: what comes after the body is another rank's."""


class DSPStrategy(SingleReplicaStrategy):
    """Cuts the layers into a pipeline of blocks, each updated at once, from diversely stale features and gradients.

    In each iteration stage ``k`` runs the forward of batch ``n`` and the backward of batch ``n - m_k``, and takes a
    step (layer-wise staleness ``m``; arXiv 1909.02625, Algorithm 1). There is no bubble and no common clock, and the
    weights depend on ``m`` alone, not on timing. The last stage lives on global rank 0, where loss, logging and
    checkpoints are.

    Args:
        stages: the number of blocks; by default one per device. With one device they are virtual, and compute the same.
        staleness: ``"dsp"`` (``m_k = 2(K-1-k)``), ``"minimal"`` (``K-1-k``), ``"bp"`` (0: back-propagation), or ``m``.
        queues: how many features may wait between two stages, one number per stage, the last 0.
        recompute: keep inputs only and run each block again before its backward (the paper's), or keep the graph.
        module: the name of the module to cut; by default the ``nn.Sequential`` with most parameters.
        split: ``"params"`` or ``"time"`` (balanced), integers (where each further block starts among the children of
            the sequential body), or names of submodules that start a block (any model that ``torch.fx`` can trace).
        **kwargs: those of :class:`~lightning_stale.strategies.base.StaleStrategy`.

    Raises:
        ValueError: for values that make no pipeline, with what to write.

    Example::

        >>> from lightning import Trainer
        >>> from lightning_stale import DSPStrategy
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy=DSPStrategy(stages=3), logger=False,
        ...                   enable_checkpointing=False)
        >>> trainer.strategy
        DSPStrategy(stages=3, staleness='dsp', split='params')
    """

    def __init__(
        self,
        *,
        stages: int | None = None,
        staleness: str | Sequence[int] = "dsp",
        queues: Sequence[int] | None = None,
        recompute: bool = True,
        module: str | None = None,
        split: Split = "params",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if stages is None and not isinstance(staleness, str):
            stages = len(staleness)
        if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
            raise ValueError(f"stages={stages!r}: write an integer >= 1, e.g. stages=3")
        if isinstance(split, str) and split not in ("params", "time"):
            raise ValueError(
                f"split={split!r}: write 'params', 'time', where blocks start (split=[3, 6]), or the names of the "
                "submodules that start a block (split=['layer2', 'layer3'])"
            )
        Staleness.of(staleness, stages or 3, queues)  # so that an error comes early
        self.stages, self.staleness, self.queues, self.recompute = stages, staleness, queues, recompute
        self.module, self.split = module, split
        self._pipeline: Pipeline | None = None
        self._blocks: list[Block] = []
        self._part: Part | None = None
        self._count, self._mine, self._built_on_meta = 0, range(0), False
        self._mesh: DeviceMesh | None = None
        self._alike: Alike | None = None
        self._path: tuple[int, ...] = ()  # what tells the present step from all others
        self._evaluated = 0
        self._calls: int | None = None  # of the body, in a step
        self._since_step = 0
        self._summary: dict[str, Any] = {"staleness": (), "stages": []}

    # --- set-up -----------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether the model was built on the meta device: then it has no memory for a checkpoint before."""
        if self._pipeline is None and self.lightning_module is not None:
            self._built_on_meta = any(tensor.is_meta for tensor in self.lightning_module.parameters())
        return self._built_on_meta

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        with warnings.catch_warnings():  # what stays on the meta device is another rank's
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            super().load_model_state_dict(checkpoint, strict)

    def model_to_device(self) -> None:
        """Move the model; of one that was built on the meta device, only the own blocks get memory."""
        module = self.lightning_module
        assert module is not None
        if not self.restore_checkpoint_after_setup:
            super().model_to_device()
            return
        if self.split == "time":
            raise MisconfigurationException(
                "split='time' cannot measure a model on the meta device: write split='params', or where blocks start"
            )
        _, self._blocks = cut_model(module.trainer, self._count, self.module, self.split, self._undo_setup)
        materialize(module, self._own_names(), self.root_device)
        self._undo_setup.append(internals.skip_broadcast(module))

    def setup_environment(self) -> None:
        """Join the other ranks; loaders may be made at any time from now on."""
        super().setup_environment()
        trainer = self._require_trainer()
        self._alike = Alike(self)
        self._undo_setup.append(internals.use_samplers_as_they_are(trainer))
        self._undo_setup.append(internals.before_loading(trainer, self._before_loading))
        self._undo_setup.append(internals.before_fetching(trainer, self._before_fetching))

    def _before_loading(self) -> None:
        """Meet before validation puts the model in eval mode (what is left is training), and let all draw alike."""
        assert self._alike is not None
        trainer = self._require_trainer()
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            trainer.training = True
            self.meet("validation")
            trainer.validating = True
        self._alike.agree()

    def _before_fetching(self) -> None:
        if self._pipeline is not None and self._alike is not None:
            self._alike.follow(self._pipeline)

    def setup(self, trainer: Trainer) -> None:
        """Set up, cut the model, and keep only what this rank owns."""
        assert self._alike is not None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check(trainer)
        stages = self.stages or self.world_size
        if stages % self.world_size:
            raise MisconfigurationException(
                f"stages={stages} on {self.world_size} devices: write a multiple of the number of devices, or "
                "devices=1 for virtual stages"
            )
        per_rank = stages // self.world_size
        first = (self.world_size - 1 - self.global_rank) * per_rank  # the last stage is on rank 0
        self._count, self._mine = stages, range(first, first + per_rank)
        self._alike.agree()
        super().setup(trainer)
        self._cut(trainer)
        callbacks, relay = internals.callbacks(trainer), MetricsRelay(self.meet, self._end_evaluation)
        callbacks.insert(int(fitting), relay)  # after MeetingPoints
        self._undo_setup.append(lambda: callbacks.remove(relay))
        if fitting:
            self.precision_plugin.clip_gradients = self._clip_per_block  # type: ignore[method-assign]
            self._undo_setup.append(lambda: self.precision_plugin.__dict__.pop("clip_gradients", None))

    def process_dataloader(self, dataloader: object) -> object:
        """Have all ranks draw the same samples."""
        if self._alike is not None and isinstance(dataloader, DataLoader):
            self._alike.prepare(dataloader)
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device."""
        if self._alike is not None:
            self._alike.note_batch(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def _check(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "DSP steps each block on its own, which manual optimization and several optimizers cannot: set "
                "automatic_optimization = True and return one optimizer (with param groups) from configure_optimizers()"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "precision='16-mixed' scales the loss, and the scale of one stage is not that of another: write "
                "precision='bf16-mixed'"
            )

    def _cut(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        stages, mine = self._count, self._mine
        staleness = Staleness.of(self.staleness, stages, self.queues)
        owner, self._blocks = cut_model(trainer, stages, self.module, self.split, self._undo_setup)
        check_disjoint(self._blocks, outside(module, owner))
        links: dict[str, Any] = {}
        if self.world_size > 1:
            self._mesh = stage_mesh(self.world_size, self.root_device)
            health = self._start_health()

            def check(neighbour: int, ended: bool) -> None:
                self._guard(lambda: health.check([neighbour], ended))

            links = link_stages(self._mesh, staleness, self.root_device, check)
        assert self._alike is not None
        self._alike.begin(trainer.state.fn == TrainerFn.FITTING, stale=any(staleness.m))
        self._pipeline = Pipeline(
            [
                Stage(
                    self._blocks[k],
                    staleness.m[k],
                    recompute=self.recompute,
                    first=k == 0,
                    last=k == stages - 1,
                    context=self.precision_plugin.forward_context,
                )
                for k in mine
            ],
            **links,
            first=mine.start,
            streams=self._alike.streams,
        )
        self._summary = {
            "staleness": staleness.m,
            "stages": [
                {"stage": k, "parameters": count_parameters(block.module)} for k, block in enumerate(self._blocks)
            ],
        }
        arguments = positional(owner)
        owner.forward = lambda *args, **kwargs: self._forward(arguments(*args, **kwargs))
        self._undo_setup.append(lambda: owner.__dict__.pop("forward", None))
        if self.world_size > 1:
            readable = constant_names(module, [block.module for block in self._blocks])
            trained = self.optimizers if trainer.state.fn == TrainerFn.FITTING else []  # or left from the last fit
            self._part = Part(module, self._own_names(), readable, trained, self._gather_everywhere)
            self._blocks = [block if k in mine else Block(nn.Module()) for k, block in enumerate(self._blocks)]
            self._separate_metrics(module)
            self._share_results(trainer)

    def _own_names(self) -> set[str]:
        assert self.lightning_module is not None
        modules = [block.module for block in self._blocks]
        return own_names(
            self.lightning_module,
            modules[self._mine.start : self._mine.stop],
            modules,
            with_rest=self._mine.stop == self._count,
        )

    def _share_results(self, trainer: Trainer) -> None:
        """Let ``trainer.validate()`` and ``test()`` return the metrics of rank 0 everywhere."""
        if trainer.evaluating:
            loop = trainer.test_loop if trainer.testing else trainer.validate_loop
            run = loop.run
            loop.run = lambda: self.broadcast(run())  # type: ignore[method-assign]
            self._undo_setup.append(lambda: loop.__dict__.pop("run", None))

    def _separate_metrics(self, module: LightningModule) -> None:
        """Let torchmetrics gather over the replicas, of which there is one, and not over the stages."""
        assert self._mesh is not None
        group = self._mesh.get_group("replica")
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                metric.process_group = group
                self._undo_setup.append(partial(setattr, metric, "process_group", None))

    # --- training ---------------------------------------------------------------------------------------------------

    def _forward(self, features: tuple[Any, ...]) -> Any:
        assert self._pipeline is not None
        assert self._alike is not None
        assert self.lightning_module is not None
        training = self._calls is not None and self.lightning_module.trainer.training
        if self.world_size > 1 and self._calls is None:
            raise MisconfigurationException(
                "the body was called outside of a step, where the stages do not run one after the other: call it in "
                "training_step, validation_step, test_step or predict_step, and keep what a later hook needs"
            )
        if self._calls and (training or self.world_size > 1):
            raise MisconfigurationException(
                "the body was called twice in one training_step, validation_step, test_step or predict_step, and a "
                "pipeline runs each batch through once: call it once, on the concatenated inputs"
            )
        if self._calls is not None:
            self._calls += 1
        if training:
            if any(tensor.requires_grad for tensor in tensors(features)):
                raise MisconfigurationException(
                    "what training_step computes before the module that was cut has parameters to train, which no "
                    "stage owns: make it part of that module, or freeze it"
                )
            run = self._pipeline.forward
        else:
            run = self._pipeline.evaluate
        tell = self._alike.tell(features)
        result = run(features, tell)
        if result is None:
            raise _StageDoneError
        if self._calls is not None:
            self._alike.compare(tell, self._pipeline.told, self._place())
        return result[0]

    def _place(self) -> str:
        trainer = self._require_trainer()
        if trainer.training:
            return f"batch {trainer.fit_loop.batch_idx} of epoch {trainer.current_epoch}"
        return f"batch {self._evaluated - 1} of the evaluation"

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Count the calls of the body in a step; a rank without the last stage is done after the first."""
        assert self._alike is not None
        trainer = self._require_trainer()
        self._path = (int(trainer.training), trainer.fit_loop.total_batch_idx, self._evaluated)
        self._evaluated += 0 if trainer.training else 1
        self._calls = 0
        try:
            with self._alike.streams.step(self._path):
                yield
        except _StageDoneError:
            pass
        finally:
            self._calls = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = torch.zeros((), device=self.root_device, requires_grad=True)
        with self._step():
            output = super().training_step(*args, **kwargs)
            if not self._calls:
                raise MisconfigurationException(
                    "training_step did not call the module that was cut: name the right one, DSPStrategy(module=...)"
                )
        if output is None:
            raise MisconfigurationException(
                "training_step returned None after the stages had run the batch: return a loss, e.g. 0 * loss"
            )
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagate the loss where it is, and run the stages' backwards of this iteration."""
        assert self._pipeline is not None
        assert self.lightning_module is not None
        assert self._alike is not None
        with self._alike.streams.apart():
            self._alike.streams.own((0, self.global_rank, *self._path))
            closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
            if self._pipeline.has_last:
                self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
            self._pipeline.backward()
            self._since_step += 1
            return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        assert self._alike is not None
        streams = self._alike.streams

        def closure_and_own_numbers() -> Any:
            result = closure()
            streams.own((1, self.global_rank, *self._path))
            return result

        with streams.apart():
            result = super().optimizer_step(optimizer, closure_and_own_numbers, model, **kwargs)
        self._since_step = 0
        return result

    def meet(self, place: str) -> None:
        """Drain the pipeline: every batch has then updated every block once."""
        if self._pipeline is None or self.lightning_module is None or not self.optimizers:
            return
        assert self._alike is not None
        optimizer, module = self._lightning_optimizers[0], self.lightning_module
        group = module.trainer.accumulate_grad_batches

        def step(force: bool = False) -> None:
            self._since_step += 0 if force else 1
            if self._since_step >= group or (force and self._since_step > 0):
                self.precision_plugin.optimizer_step(optimizer._optimizer, model=module, closure=lambda: None)
                optimizer._optimizer.zero_grad()
                self._since_step = 0

        if self._pipeline.behind:
            if self._since_step == 0:  # what the last step has used
                optimizer._optimizer.zero_grad()
            with torch.enable_grad(), self._alike.streams.apart():
                self._alike.streams.own((2, self.global_rank, *self._path))
                self._pipeline.drain(step)
                step(force=True)
        self._pipeline.restart()

    def _clip_per_block(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val > 0:
            by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
            clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
            clip_per_block(optimizer, [block.module for block in self._blocks], lambda group: clip(group, clip_val))

    def _end_evaluation(self) -> None:
        assert self._pipeline is not None
        self._pipeline.end_evaluation()

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step():
            return super().validation_step(*args, **kwargs)
        return None

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step():
            return super().test_step(*args, **kwargs)
        return None

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step():
            return super().predict_step(*args, **kwargs)
        return None

    # --- checkpoints and the end ------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole model's weights, after draining."""
        assert self.lightning_module is not None
        if self._part is None:
            self.meet("a checkpoint")
            return super().lightning_module_state_dict()
        if self.lightning_module.trainer.interrupted:
            raise RuntimeError("the run has failed, and a checkpoint needs every stage: resume from the last one")
        self.meet("a checkpoint")
        return self._part.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole optimizer's state, in the user's parameter order."""
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = None if self._part is None else self._part.optimizer_state(raw)
        return super().optimizer_state(optimizer) if state is None else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of each optimizer's state."""
        if self._part is None:
            super().load_optimizer_state_dict(checkpoint)
        else:
            self._part.load_optimizers(checkpoint["optimizer_states"])

    def on_train_end(self) -> None:
        """Put the model and its optimizers together again."""
        super().on_train_end()
        self._note_summary()
        if self._part is not None:
            self._part.join()

    def teardown(self) -> None:
        """End the channels, and give back what has been replaced."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._end_health()
        if self.lightning_module is not None and any(p.is_meta for p in self.lightning_module.parameters()):
            fn = self.lightning_module._trainer and self.lightning_module.trainer.state
            ended_well = fn and not self.lightning_module.trainer.interrupted  # validate, test or predict
            put_back(self.lightning_module, self._part.values() if ended_well and self._part is not None else {})
        self._part, self._blocks, self._mesh, self._alike = None, [], None, None
        super().teardown()

    def summary(self) -> dict[str, Any]:
        """Return ``{"staleness": m, "stages": [{"stage", "parameters", "busy_s"}, ...]}``; times after ``fit``."""
        return self._summary

    def _note_summary(self) -> None:
        assert self._pipeline is not None
        busy = [self._pipeline.busy_s]
        if self.world_size > 1:
            busy = self._gather_everywhere(self._pipeline.busy_s)[::-1]
        per_rank = len(self._summary["stages"]) // len(busy)
        for row in self._summary["stages"]:
            row["busy_s"] = busy[row["stage"] // per_rank] / per_rank

    def __repr__(self) -> str:
        return f"{type(self).__name__}(stages={self.stages}, staleness={self.staleness!r}, split={self.split!r})"
