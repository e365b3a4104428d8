"""The layer-wise pipeline in Lightning: an unmodified module, cut into blocks with diversely stale parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.channels.links import Links, destroy_mesh, stage_mesh
from lightning_stale.pipeline.clipping import clip_per_block
from lightning_stale.pipeline.divided.ownership import constant_names, own_names
from lightning_stale.pipeline.divided.tensors import tensors_named
from lightning_stale.pipeline.partition.body import outside, positional
from lightning_stale.pipeline.partition.costs import count_parameters
from lightning_stale.pipeline.partition.disjoint import check_disjoint
from lightning_stale.pipeline.partition.model import Split
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.replaced_forward import ReplacedForward
from lightning_stale.pipeline.stage import Stage
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.pipeline.values.trees import tensors
from lightning_stale.private import of_lightning
from lightning_stale.strategies.alike import Alike
from lightning_stale.strategies.partitioning import partition
from lightning_stale.strategies.predictions import share_predictions
from lightning_stale.strategies.relay import MetricsRelay
from lightning_stale.strategies.whole_model import Whole, WholeModelStrategy

_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")


class _StageDoneError(Exception):
    """Ends a step on a rank without the last stage: what comes after the body is another rank's."""


class DSPStrategy(WholeModelStrategy):
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
        ValueError: for values that make no pipeline, with what to write.

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
        super().__init__(gather=gather, **kwargs)
        if stages is None and not isinstance(staleness, str):
            stages = len(staleness)
        if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
            raise ValueError(f"stages={stages!r}: write an integer >= 1, e.g. stages=3")
        if isinstance(split, str) and split not in ("params", "time"):
            raise ValueError(
                f"split={split!r}: write 'params', 'time', where blocks start (split=[3, 6]), or the names of the "
                "submodules that start a block (split=['layer2', 'layer3'])"
            )
        if not isinstance(split, str) and split:
            if stages is not None and stages != len(split) + 1:
                raise ValueError(
                    f"split={list(split)} makes {len(split) + 1} blocks for {stages} stages: write stages="
                    f"{len(split) + 1} (and as many numbers in staleness), or {stages - 1} starts in split"
                )
            stages = len(split) + 1
        Staleness.of(staleness, stages or 3, queues)  # so that an error comes early
        self.stages, self.staleness, self.queues, self.recompute = stages, staleness, queues, recompute
        self.module, self.split = module, split
        self._pipeline: Pipeline | None = None
        self._owner: nn.Module | None = None
        self._blocks: list[Block] = []
        self._count, self._mine = 0, range(0)
        self._mesh: DeviceMesh | None = None
        self._alike: Alike | None = None
        self._path: tuple[int, ...] = ()  # what tells the present step from all others
        self._evaluated = 0
        self._links: Links | None = None
        self._calls: int | None = None  # of the body, in a step
        self._since_step = 0
        self._summary: dict[str, Any] = {"staleness": (), "stages": []}

    # --- set-up -----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the other ranks; loaders may be made at any time from now on."""
        super().setup_environment()
        trainer = self._require_trainer()
        self._alike = Alike(self)
        self._undo_setup.append(of_lightning.use_samplers_as_they_are(trainer))
        self._undo_setup.append(of_lightning.before_loading(trainer, self._before_loading))
        self._undo_setup.append(of_lightning.before_fetching(trainer, self._before_fetching))

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
            self._check_callbacks(trainer)
        stages = self.stages or self.world_size
        if stages % self.world_size:
            raise MisconfigurationException(
                f"stages={stages} on {self.world_size} devices: write a multiple of {self.world_size}, e.g. "
                f"stages={self.world_size}{self._as_many_starts()}, or devices=1 for virtual stages"
            )
        per_rank = stages // self.world_size
        first = (self.world_size - 1 - self.global_rank) * per_rank  # the last stage is on rank 0
        self._count, self._mine = stages, range(first, first + per_rank)
        self._alike.agree()
        super().setup(trainer)
        self._cut(trainer)
        callbacks, relay = of_lightning.callbacks(trainer), MetricsRelay(self.meet, self._end_evaluation)
        callbacks.insert(int(fitting), relay)  # after MeetingPoints
        self._undo_setup.append(lambda: callbacks.remove(relay))
        if fitting:
            self.precision_plugin.clip_gradients = self._clip_per_block  # type: ignore[method-assign]
            self._undo_setup.append(lambda: self.precision_plugin.__dict__.pop("clip_gradients", None))

    def _as_many_starts(self) -> str:
        if isinstance(self.split, str):
            return ""
        return f" with {self.world_size - 1} instead of {len(self.split)} starts in split"

    def process_dataloader(self, dataloader: object) -> object:
        """Have all ranks draw the same samples."""
        if self._alike is not None and isinstance(dataloader, DataLoader):
            self._undo_setup.extend(self._alike.prepare(dataloader))
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device."""
        if self._alike is not None:
            self._alike.note_batch(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def check_before_launch(self, trainer: Trainer) -> None:
        super().check_before_launch(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer)

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
        owner = self._cut_once(trainer)
        check_disjoint(self._blocks, outside(module, owner))
        if self.world_size > 1:
            self._mesh = stage_mesh(self.world_size, self.root_device)
            health = self._start_health()

            def check(neighbour: int, ended: bool) -> None:
                self._guard(lambda: health.check([neighbour], ended))

            self._links = Links(self._mesh, staleness, self.root_device, check, self.timeout)
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
            **({} if self._links is None else self._links.channels),
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
        run = of_lightning.not_compiled(lambda *args, **kwargs: self._forward(arguments(*args, **kwargs)))
        self._undo_setup.append(of_lightning.replace_forward(module, owner, ReplacedForward(owner, run)))
        if self.world_size > 1:
            trained = self.optimizers if trainer.state.fn == TrainerFn.FITTING else []  # or left from the last fit
            self._divide(trainer, trained)
            self._blocks = [block if k in mine else Block(nn.Module()) for k, block in enumerate(self._blocks)]
            self._separate_metrics(module)
            self._share_results(trainer)

    def _cut_once(self, trainer: Trainer) -> nn.Module:
        """Return the module that the blocks replace."""
        if self._owner is None:
            self._owner, self._blocks = partition(trainer, self._count, self.module, self.split)
        return self._owner

    def _own(self) -> tuple[list[set[str]], set[str]]:
        trainer = self._require_trainer()
        module = trainer.lightning_module
        if self._owner is None and self.split == "time" and trainer.state.fn == TrainerFn.FITTING:
            everything = tensors_named(module)  # it is measured whole, once there are optimizers
            return [everything] * self.world_size, set()
        self._cut_once(trainer)
        modules = [block.module for block in self._blocks]
        per_rank = self._count // self.world_size
        starts = range(self._count - per_rank, -1, -per_rank)  # the last stage is on rank 0
        own = [
            own_names(module, modules[start : start + per_rank], modules, with_rest=start + per_rank == self._count)
            for start in starts
        ]
        return own, constant_names(module, modules)

    @contextmanager
    def _all_ranks(self) -> Iterator[None]:
        if self._pipeline is not None:
            self._pipeline.widen()
        with super()._all_ranks():
            yield

    def _is_cut(self) -> bool:
        return self._pipeline is not None

    def _forget_batches(self) -> None:
        assert self._pipeline is not None
        self._pipeline.restart()
        self._since_step = 0

    def _share_results(self, trainer: Trainer) -> None:
        """Let ``trainer.validate()``, ``test()`` and ``predict()`` return the results of rank 0 everywhere."""
        if trainer.predicting:
            self._undo_setup.extend(share_predictions(trainer))
        if trainer.evaluating:
            loop = trainer.test_loop if trainer.testing else trainer.validate_loop
            run = loop.run
            loop.run = lambda: self.broadcast(run())  # type: ignore[method-assign]
            self._undo_setup.append(lambda: loop.__dict__.pop("run", None))

    def _separate_metrics(self, module: LightningModule) -> None:
        """Let torchmetrics gather over the replicas, of which there is one, and not over the stages."""
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                available = metric.distributed_available_fn
                metric.distributed_available_fn = bool  # says False, and unlike a process group can be pickled
                self._undo_setup.append(partial(setattr, metric, "distributed_available_fn", available))

    # --- training ---------------------------------------------------------------------------------------------------

    def _forward(self, features: tuple[Any, ...]) -> Any:
        assert self._pipeline is not None
        assert self._alike is not None
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        training = self._calls is not None and trainer.training
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
        if training and not of_lightning.skips_backward(trainer):
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
        except (RuntimeError, NotImplementedError) as error:
            if self._calls == 0 and self.world_size > 1 and "meta" in str(error):  # another rank's part of the model
                raise MisconfigurationException(self._call_what_was_cut()) from error
            raise
        finally:
            self._calls = None

    def _call_what_was_cut(self) -> str:
        assert self.lightning_module is not None
        path = next(path for path, module in self.lightning_module.named_modules() if module is self._owner)
        if not path:
            return (
                "a step did not call self(...), whose forward the blocks of configure_stages() replace: write self(x) "
                "instead of, say, self.net(x) in training_step, validation_step, test_step and predict_step"
            )
        return (
            f"a step did not call self.{path.replace('_orig_mod.', '')}(...), the module that was cut: call it as a "
            "whole, or name the one that is called, DSPStrategy(module=...)"
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = torch.zeros((), device=self.root_device, requires_grad=True)
        with self._step():
            output = super().training_step(*args, **kwargs)
            if not self._calls:
                raise MisconfigurationException(self._call_what_was_cut())
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
        self._warn_of_gradients()
        return result

    def _warn_of_gradients(self) -> None:
        assert self.lightning_module is not None
        if self.world_size > 1 and of_lightning.logs_in(self.lightning_module.trainer, _GRADIENT_HOOKS):
            rank_zero_warn(
                f"what {' and '.join(_GRADIENT_HOOKS)} log of gradients, such as their norm, is that of the last stage "
                "alone: the gradients of the others are on other ranks. DSPStrategy(stages="
                f"{self._count}) with Trainer(devices=1) has them all"
            )

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

    # --- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Drain, which after a trial run (LearningRateFinder) nobody else has done."""
        super().on_train_end()
        self.meet("the end of fit")
        self._note_summary()

    def teardown(self) -> None:
        """End the channels, put the model together again, and give back what has been replaced."""
        self._pipeline = None
        self._end_links()
        self._join()
        self._end_health()
        self._owner, self._blocks, self._alike = None, [], None
        super().teardown()

    def _end_links(self) -> None:
        links, self._links = self._links, None
        if links is not None and self._require_trainer().interrupted:
            links.break_off()
        elif links is not None:
            links.end()
        if self._mesh is not None:
            destroy_mesh(self._mesh)
            self._mesh = None

    def _quiet(self) -> AbstractContextManager[None]:
        return nullcontext() if self._links is None else self._links.quiet()

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
