"""Reaches into private state of Lightning (read in 2.6.6); a test fails when one of them moves."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)


class LightningChangedError(RuntimeError):
    """This version of Lightning is not the one that this package was made for."""


def broadcast_module(module: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    _sync_module_states(module)


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer that ``module`` is attached to, if any."""
    return module._trainer


def synchronizes_batch_norm(strategy: ParallelStrategy) -> bool:
    """Whether ``Trainer(sync_batchnorm=True)``."""
    return strategy._layer_sync is not None


def replace(owner: object, name: str, value: Any) -> Callable[[], None]:
    """Let the attribute ``name`` of this one object be ``value`` until what is returned is called."""
    setattr(owner, name, value)
    return lambda: vars(owner).pop(name, None)


def note_device(module: LightningModule, device: torch.device) -> None:
    """Let ``module.device`` say where its tensors are, which were moved one by one."""
    module._device = device


def resume_from(trainer: Trainer, path: str) -> None:
    """Let the run that the Trainer is about to set up resume from ``path``, a file of its own, whatever it was told.

    Only the first checkpoint is another one: a LearningRateFinder restores its own while it tries.
    """
    connector = trainer._checkpoint_connector

    def resume_start(*_: Any, **__: Any) -> None:
        undo()
        connector.resume_start(path, weights_only=False)

    undo = replace(connector, "resume_start", resume_start)


def averaged_models(trainer: Trainer) -> list[AveragedModel]:
    """Return the averages of the model that Lightning's callbacks hold."""
    found = [c._average_model for c in callbacks(trainer) if isinstance(c, WeightAveraging)]
    return [average for average in found if average is not None]


def skips_backward(trainer: Trainer) -> bool:
    """Whether this epoch of training runs forwards only, as the last of StochasticWeightAveraging."""
    return trainer.fit_loop._skip_backward


def free_batches(trainer: Trainer) -> Callable[[], None]:
    """Let a training batch pass without a collective; return what undoes it.

    Since 2.5.2, every batch ends in a broadcast that tells all ranks of a SIGTERM
    (``_TrainingEpochLoop._broadcast_sigterm_tensor``), which locks the workers in step, and the handler of SIGTERM
    takes part in it. Both are replaced: the handler notes the signal and passes it on to the processes that this one
    has launched, and the other ranks hear of it through the parameter server.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    for owner, name in ((loop, "_broadcast_sigterm_tensor"), (connector, "_sigterm_notifier_fn")):
        if not callable(getattr(owner, name, None)):
            raise LightningChangedError(
                f"{type(owner).__name__}.{name} is gone from this version of Lightning: install the version range that "
                "lightning-stale asks for, or a newer lightning-stale"
            )

    def note_sigterm(signum: int, _: Any) -> None:
        log.debug("rank %d received signal %d", trainer.global_rank, signum)
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        connector.received_sigterm = True

    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    connector._sigterm_notifier_fn = note_sigterm  # type: ignore[method-assign]

    def undo() -> None:
        loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        connector.__dict__.pop("_sigterm_notifier_fn", None)

    return undo


def callbacks(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's own list of callbacks, in the order in which they are called."""
    own: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return own


def note_sigterm(trainer: Trainer) -> None:
    """Let this rank end as if it had received SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def validates_by_time(trainer: Trainer) -> bool:
    """Whether ``val_check_interval`` is a time."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def limits_time_by_batch(callback: Timer) -> bool:
    """Whether ``callback`` may end training after each batch, and not at the end of an epoch, or never."""
    return callback._duration is not None and callback._interval == Interval.step


def saves_by_time(callback: ModelCheckpoint) -> bool:
    """Whether ``train_time_interval`` is set."""
    return callback._train_time_interval is not None


def saves_now(callback: Callback, trainer: Trainer) -> bool:
    """Whether ``callback`` may save a checkpoint at the end of this training batch."""
    steps = callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 0
    return steps >= 1 and trainer.global_step % steps == 0


def logs_now(trainer: Trainer) -> bool:
    """Whether what is logged in this training batch is written: every ``log_every_n_steps``, once a step is complete.

    As ``_LoggerConnector.update_train_step_metrics`` of Lightning 2.6 decides, without the detours of
    ``should_update_logs``: it is asked after every batch.
    """
    every, stepped = trainer.log_every_n_steps, trainer.fit_loop.epoch_loop._batches_that_stepped  # type: ignore[attr-defined]
    writes = every > 0 and ((stepped + 1) % every == 0 or trainer.should_stop)
    if not (writes or trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    return not (trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization)


def pass_over_logged(trainer: Trainer, names: Collection[str]) -> None:
    """Let what was logged under ``names`` with ``on_step`` be written in this batch, and looked at in no later one.

    In each batch, Lightning looks at whatever has been logged in the epoch.
    """
    for result in (trainer._results or {}).values():
        if result.meta.name in names and not result.meta.on_epoch:
            result.has_reset = True  # until it is logged again


def logs_in(trainer: Trainer, hooks: Sequence[str]) -> bool:
    """Whether one of ``hooks`` has logged something in this epoch."""
    return any(key.startswith(f"{hook}.") for key in trainer._results or () for hook in hooks)


def in_notebook() -> bool:
    """Whether this process is a notebook's, or another interactive one, as Lightning sees it."""
    return bool(accelerator_connector._IS_INTERACTIVE)  # type: ignore[attr-defined]


def current_hook(module: LightningModule) -> str | None:
    """Return the name of the LightningModule hook that runs now."""
    return module._current_fx_name


def batch_sampler(loader: DataLoader[Any]) -> Any:
    """Return the batch sampler that the user has made, under the wrapper that Lightning puts around it to predict."""
    return getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)


def compiler(module: torch.nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Return what compiles a function as ``torch.compile(module)`` or ``module.compile()`` has compiled ``module``."""
    whole = getattr(module, "_compiler_ctx", None)  # a LightningModule that the Trainer was given compiled
    context: Any = whole["dynamo_ctx"] if whole is not None else getattr(module, "dynamo_ctx", None)
    call: Any = module._compiled_call_impl
    if context is None and call is not None:
        context = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))["self"].cell_contents
    return None if context is None else context


def replace_forward(model: torch.nn.Module, owner: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a call of ``owner`` be one of ``forward``; return what undoes it.

    Args:
        model: the LightningModule.
        owner: the module that was cut; wrappers that ``torch.compile`` has put around it call ``forward`` too.
        forward: the new one.
    """
    modules = [owner, *(module for module in model.modules() if getattr(module, "_orig_mod", None) is owner)]
    names = ("forward", "_compiled_call_impl")
    before: list[tuple[torch.nn.Module, dict[str, Any]]] = [
        (module, {name: vars(module)[name] for name in names if name in vars(module)}) for module in modules
    ]
    for module in modules:
        vars(module).pop("_compiled_call_impl", None)
        vars(module)["forward"] = forward

    def undo() -> None:
        for module, attributes in before:
            vars(module).pop("forward", None)
            vars(module).update(attributes)

    return undo


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as it runs where ``torch.compile`` has what calls it."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class _CapturedError(Exception):
    """Breaks off a training step once the input of a module is known."""


def first_input(trainer: Trainer, module: torch.nn.Module) -> Any:
    """Return what ``module`` is given in the training step of the first batch.

    Nothing else remains of that step but what it has drawn: keep the random state around it.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    captured: list[Any] = []

    def capture(*args: Any) -> None:
        captured.append(args[0])
        raise _CapturedError

    batch = trainer.precision_plugin.convert_input(next(iter(loader)))
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    undo = replace_forward(trainer.lightning_module, module, not_compiled(capture))
    try:
        with trainer.precision_plugin.train_step_context():
            trainer.lightning_module.training_step(batch, 0)
    except _CapturedError:
        pass
    finally:
        undo()
    return captured[0]


def use_samplers_as_they_are(trainer: Trainer) -> Callable[[], None]:
    """Let Lightning leave the samplers alone, in loaders that are made early too; return what undoes it.

    There is one replica, whose order the strategy shares itself, and the sampler that Lightning injects would shuffle
    training data even where the user has not asked for it.
    """
    connector = trainer._accelerator_connector
    before = connector.use_distributed_sampler
    connector.use_distributed_sampler = False
    return partial(setattr, connector, "use_distributed_sampler", before)


def before_loading(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` whenever a loop is about to make its loaders or begin anew with them; return what undoes it."""
    fit = trainer.fit_loop
    places: list[tuple[Any, str]] = [(fit, "setup_data"), (fit.epoch_loop, "on_run_start")]
    loops = (fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    return _call_first([*places, *((loop, "setup_data") for loop in loops)], call)


def before_fetching(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` whenever ``fit`` is about to take a batch from a loader; return what undoes it."""
    loop = trainer.fit_loop.epoch_loop
    return _call_first([(loop, "_on_before_fetch"), (loop.val_loop, "_on_before_fetch")], call)


def _call_first(places: list[tuple[Any, str]], call: Callable[[], None]) -> Callable[[], None]:
    def calling(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            call()
            return method(*args, **kwargs)

        return called

    for owner, name in places:
        if not callable(getattr(owner, name, None)):
            raise LightningChangedError(
                f"{type(owner).__name__}.{name} is gone from this version of Lightning: install the version range that "
                "lightning-stale asks for, or a newer lightning-stale"
            )
    for owner, name in places:
        setattr(owner, name, calling(getattr(owner, name)))

    def undo() -> None:
        for owner, name in places:
            owner.__dict__.pop(name, None)

    return undo


def seed_workers_alike(loader: DataLoader[Any]) -> Callable[[], None]:
    """Seed the workers of ``loader`` on every rank as Lightning seeds rank 0's; return what undoes it.

    That is for ``seed_everything(workers=True)``.
    """
    before = loader.worker_init_fn
    seeds = int(os.environ.get("PL_SEED_WORKERS", 0)) and before is None
    if not seeds and getattr(before, "func", before) is not pl_worker_init_function:  # which asks for the rank
        return lambda: None
    loader.worker_init_fn = partial(pl_worker_init_function, rank=0)
    reference = weakref.ref(loader)

    def undo() -> None:
        there = reference()
        if there is not None:
            there.worker_init_fn = before

    return undo


def choose_backend(strategy: DDPStrategy) -> str:
    """Return the backend of the process group that ``strategy`` would make, and let it know."""
    strategy._process_group_backend = strategy._get_process_group_backend()
    return strategy._process_group_backend
