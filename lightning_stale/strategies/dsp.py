"""The layer-wise pipeline in Lightning: an unmodified module, cut into blocks with diversely stale parameters."""

from __future__ import annotations

import inspect
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_stale.pipeline.channels import Channel
from lightning_stale.pipeline.health import Health, StageFailedError
from lightning_stale.pipeline.links import link_stages, stage_mesh
from lightning_stale.pipeline.order import share_order
from lightning_stale.pipeline.ownership import (
    OptimizerShare,
    complete_state_dict,
    gather_everywhere,
    own_names,
    own_values,
    put_back,
    release_others,
)
from lightning_stale.pipeline.partition import count_parameters
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Block, Stage, check_disjoint
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.strategies import internals
from lightning_stale.strategies.base import StaleStrategy
from lightning_stale.strategies.cut import Split, cut_model
from lightning_stale.strategies.relay import MetricsRelay

_PATIENCE_S = 20.0


class _StageDoneError(Exception):
    """Ends a step on a rank without the last stage: what comes after the body is another rank's."""


class DSPStrategy(StaleStrategy):
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
        self._health: Health | None = None
        self._shares: list[OptimizerShare] = []
        self._own: set[str] = set()
        self._mesh: DeviceMesh | None = None
        self._called = False
        self._since_step = 0
        self._summary: dict[str, Any] = {"staleness": (), "stages": []}

    # --- set-up -----------------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One replica: every rank sees all batches."""
        return {"num_replicas": 1, "rank": 0}

    def setup(self, trainer: Trainer) -> None:
        """Set up, cut the model, and keep only what this rank owns."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check(trainer)
        super().setup(trainer)
        internals.keep_samplers(trainer)
        self._cut(trainer)
        if fitting:
            self.precision_plugin.clip_gradients = self._clip_per_block  # type: ignore[method-assign]
            self._undo_setup.append(lambda: self.precision_plugin.__dict__.pop("clip_gradients", None))

    def process_dataloader(self, dataloader: object) -> object:
        """Have all ranks draw the same order."""
        if self.world_size > 1:
            share_order(dataloader)
        return dataloader

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
        stages = self.stages or self.world_size
        if stages % self.world_size:
            raise MisconfigurationException(
                f"stages={stages} on {self.world_size} devices: write a multiple of the number of devices, or "
                "devices=1 for virtual stages"
            )
        staleness = Staleness.of(self.staleness, stages, self.queues)
        owner, self._blocks = cut_model(trainer, stages, self.module, self.split, self._undo_setup)
        check_disjoint(self._blocks)
        per_rank = stages // self.world_size
        first = (self.world_size - 1 - self.global_rank) * per_rank  # the last stage is on rank 0
        mine = range(first, first + per_rank)
        links: dict[str, Channel] = {}
        if self.world_size > 1:
            self._mesh = stage_mesh(self.world_size, self.root_device)
            prefix = f"lightning_stale/{super().broadcast(uuid.uuid4().hex)}"
            store = internals.rendezvous_store()
            self._health = Health(store, prefix, self.global_rank, _PATIENCE_S, self._check_signals)
            links = link_stages(self._mesh, staleness, self.root_device, self._health)
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
        )
        self._summary = {
            "staleness": staleness.m,
            "stages": [
                {"stage": k, "parameters": count_parameters(block.module)} for k, block in enumerate(self._blocks)
            ],
        }
        signature = inspect.signature(type(owner).forward).bind
        owner.forward = lambda *args, **kwargs: self._forward(_bound(signature, owner, args, kwargs))
        self._undo_setup.append(lambda: owner.__dict__.pop("forward", None))
        if self.world_size > 1:
            self._own = own_names(
                module,
                [self._blocks[k].module for k in mine],
                [block.module for block in self._blocks],
                with_rest=mine[-1] == stages - 1,
            )
            names = {id(p): name for name, p in module.named_parameters()}
            self._shares = [OptimizerShare(optimizer, names, self._own) for optimizer in self.optimizers]
            release_others(module, self._own)
            self._blocks = [block if k in mine else Block(nn.Module()) for k, block in enumerate(self._blocks)]
            self._separate_metrics(module)
            callbacks = internals.callbacks(trainer)
            relay = MetricsRelay()
            callbacks.insert(1 if trainer.state.fn == TrainerFn.FITTING else 0, relay)
            self._undo_setup.append(lambda: callbacks.remove(relay))

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
        assert self.lightning_module is not None
        if self.lightning_module.trainer.training:
            if self._called:
                raise MisconfigurationException(
                    "the body was called twice in one training_step, and a pipeline runs each batch through once: call "
                    "it once, on the concatenated inputs"
                )
            self._called = True
            result = self._pipeline.forward(features)
        else:
            result = self._pipeline.evaluate(features)
        if result is None:
            raise _StageDoneError
        return result[0]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._called = False
        try:
            output = super().training_step(*args, **kwargs)
        except _StageDoneError:
            return torch.zeros((), device=self.root_device, requires_grad=True)
        if not self._called:
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
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        if self._pipeline.has_last:
            self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
        self._pipeline.backward()
        self._since_step += 1
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._since_step = 0
        return result

    def meet(self, place: str) -> None:
        """Drain the pipeline: every batch has then updated every block once."""
        if self._pipeline is None or self.lightning_module is None or not self.optimizers:
            return
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
            with torch.enable_grad():
                self._pipeline.drain(step)
            step(force=True)
        self._pipeline.restart()

    def _clip_per_block(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip each block by its own norm: no block knows another's gradient of the same batch."""
        if clip_val <= 0:
            return
        block_of = {id(p): k for k, block in enumerate(self._blocks) for p in block.module.parameters()}
        rest = len(self._blocks) - 1
        groups: dict[int, list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                groups.setdefault(block_of.get(id(parameter), rest), []).append(parameter)
        for parameters in groups.values():
            if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
                torch.nn.utils.clip_grad_value_(parameters, clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, clip_val)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return _until_done(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return _until_done(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return _until_done(super().predict_step, *args, **kwargs)

    # --- one replica ------------------------------------------------------------------------------------------------

    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the replicas, of which there is one."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather over the replicas, of which there is one."""
        return tensor.unsqueeze(0)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Take the decision of rank 0, where the metrics are."""
        return bool(self.broadcast(decision))

    # --- checkpoints and the end ------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole model's weights, after draining."""
        assert self.lightning_module is not None
        if self._pipeline is None or self.world_size == 1:
            self.meet("a checkpoint")
            return super().lightning_module_state_dict()
        if self.lightning_module.trainer.interrupted:
            raise RuntimeError("the run has failed, and a checkpoint needs every stage: resume from the last one")
        self.meet("a checkpoint")
        return complete_state_dict(self.lightning_module, gather_everywhere(own_values(self.lightning_module)))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole optimizer's state, in the user's parameter order."""
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for share in self._shares:
            if share.optimizer is raw:
                return share.complete(gather_everywhere(share.state()))
        return super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of each optimizer's state."""
        if not self._shares:
            super().load_optimizer_state_dict(checkpoint)
        for share, state in zip(self._shares, checkpoint["optimizer_states"], strict=False):
            share.load(state)

    def on_train_end(self) -> None:
        """Put the model and its optimizers together again."""
        super().on_train_end()
        self._note_summary()
        if self.world_size > 1:
            assert self.lightning_module is not None
            everyone = gather_everywhere(own_values(self.lightning_module))
            states = [share.complete(gather_everywhere(share.state())) for share in self._shares]
            put_back(self.lightning_module, {name: v for values in everyone for name, v in values.items()})
            for share, state in zip(self._shares, states, strict=True):
                share.join(self.lightning_module, state)
            self._shares = []

    def teardown(self) -> None:
        """End the channels, and give back what has been replaced."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        if self._health is not None:
            self._health.close()
            self._health = None
        if self.lightning_module is not None and any(p.is_meta for p in self.lightning_module.parameters()):
            fn = self.lightning_module._trainer and self.lightning_module.trainer.state
            values: dict[str, Tensor] = {}
            if fn and not self.lightning_module.trainer.interrupted:  # validate, test or predict has ended well
                everyone = gather_everywhere(own_values(self.lightning_module))
                values = {name: v for own in everyone for name, v in own.items()}
            put_back(self.lightning_module, values)
        self._shares, self._blocks, self._mesh = [], [], None
        super().teardown()

    def report(self, exception: BaseException) -> None:
        if self._health is None or isinstance(exception, StageFailedError):
            return
        first = self._health.failure()
        if first is not None:
            exception.__cause__ = exception.__cause__ or first
        elif isinstance(exception, KeyboardInterrupt):
            self._health.fail("interrupt", f"rank {self.global_rank} was interrupted")
        elif isinstance(exception, SIGTERMException):
            self._health.fail("sigterm", f"rank {self.global_rank} received SIGTERM")
        else:
            lines = "".join(traceback.format_exception(exception))
            self._health.fail(
                "error", f"rank {self.global_rank} raised {type(exception).__name__}; its traceback:\n{lines}"
            )

    def summary(self) -> dict[str, Any]:
        """Return ``{"staleness": m, "stages": [{"stage", "parameters", "busy_s"}, ...]}``; times after ``fit``."""
        return self._summary

    def _note_summary(self) -> None:
        assert self._pipeline is not None
        busy = [self._pipeline.busy_s]
        if self.world_size > 1:
            busy = gather_everywhere(self._pipeline.busy_s)[::-1]
        per_rank = len(self._summary["stages"]) // len(busy)
        for row in self._summary["stages"]:
            row["busy_s"] = busy[row["stage"] // per_rank] / per_rank

    def _check_signals(self) -> None:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.received_sigterm:
            raise SIGTERMException

    def __repr__(self) -> str:
        return f"{type(self).__name__}(stages={self.stages}, staleness={self.staleness!r}, split={self.split!r})"


def _bound(bind: Callable[..., inspect.BoundArguments], owner: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in the order of the signature, defaults included."""
    bound = bind(owner, *args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())[1:]


def _until_done(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return step(*args, **kwargs)
    except _StageDoneError:
        return None
