"""How Lightning saves and resumes, for one who begins amid a fit (read in 2.6.6); a test fails when it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer import call
from torch import Tensor, nn

from lightning_stale.private.of_lightning import callbacks, replace

_WITH_WEIGHTS = ("state_dict", "current_model_state")
"""Where a checkpoint has those of the model; the second is what ``WeightAveraging`` calls them."""
_SAVED = ("_last_global_step_saved", "_last_checkpoint_saved")
_ALONE: dict[str, Callable[..., Any]] = {
    "reduce": lambda tensor, *_, **__: tensor,
    "all_gather": lambda tensor, *_, **__: tensor.unsqueeze(0),
    "broadcast": lambda obj, src=0: obj,
    "barrier": lambda *_, **__: None,
    "reduce_boolean_decision": lambda decision, all=True: decision,
}
"""The collectives of a strategy, for one."""
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def dump(trainer: Trainer, trained: set[int]) -> dict[str, Any]:
    """Return what ``trainer.save_checkpoint()`` would save, by this rank alone and without what the server has.

    That is without the memory of trained weights (averages of them that a callback holds are there), and of the
    optimizers without what they keep for each parameter: their param groups are there, with the rates of now.

    Args:
        trainer: between two batches.
        trained: where the trained parameters lie (``data_ptr()``).
    """
    connector, strategy, module = trainer._checkpoint_connector, trainer.strategy, trainer.lightning_module
    with ExitStack() as undo:
        for name, alone in _ALONE.items():  # a hook that saves may call them, and here nobody else does
            undo.callback(replace(strategy, name, alone))
        undo.callback(replace(connector, "_get_lightning_module_state_dict", module.state_dict))
        undo.callback(replace(strategy, "optimizer_state", lambda optimizer: _groups_of(optimizer.state_dict())))
        checkpoint = connector.dump_checkpoint(weights_only=False)
    for key in _WITH_WEIGHTS:
        if key in checkpoint:
            checkpoint[key] = {
                name: value
                for name, value in checkpoint[key].items()
                if not (isinstance(value, Tensor) and value.data_ptr() in trained)
            }
    return checkpoint


def _groups_of(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {}}


def unsaved_state(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint lacks and what is saved, and when to stop, is decided by: the metrics of now, say."""
    return {
        "metrics": {name: dict(getattr(trainer._logger_connector, name)) for name in _METRICS},
        "has_validated": trainer.fit_loop.epoch_loop.val_loop._has_run,
        "saved": [
            {name: getattr(callback, name) for name in _SAVED}
            for callback in callbacks(trainer)
            if isinstance(callback, ModelCheckpoint)
        ],
    }


def set_unsaved_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Have what :func:`unsaved_state` returned on another rank."""
    for name, metrics in state["metrics"].items():
        setattr(trainer._logger_connector, name, dict(metrics))
    trainer.fit_loop.epoch_loop.val_loop._has_run = state["has_validated"]
    saving = (callback for callback in callbacks(trainer) if isinstance(callback, ModelCheckpoint))
    for callback, saved in zip(saving, state["saved"], strict=True):
        for name, value in saved.items():
            setattr(callback, name, value)


def resume_from(
    trainer: Trainer, load: Callable[[], dict[str, Any]], load_model: Callable[[nn.Module], None]
) -> Callable[[], None]:
    """Let the fit that is about to start resume from what ``load`` returns, whatever checkpoint it was given.

    Args:
        trainer: its model is attached.
        load: returns what :func:`dump` did on another rank.
        load_model: called with the model, after its own hook, to give it what is not trained.

    Returns:
        What undoes it.
    """
    connector, strategy = trainer._checkpoint_connector, trainer.strategy

    def load_checkpoint(*_: Any, **__: Any) -> dict[str, Any]:
        checkpoint, own = load(), trainer.lightning_module.state_dict()
        for key in _WITH_WEIGHTS:
            if key in checkpoint:
                checkpoint[key] = {**own, **checkpoint[key]}
        _take_over_folders(trainer, checkpoint["callbacks"])
        return checkpoint

    def resume_start(*_: Any, **__: Any) -> None:
        connector._ckpt_path = None  # nothing is said of a file
        connector._loaded_checkpoint = strategy.load_checkpoint("", weights_only=False)

    def load_model_state_dict(checkpoint: dict[str, Any], **_: Any) -> None:
        module = trainer.lightning_module
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        load_model(module)

    undo = [
        replace(connector, "resume_start", resume_start),
        replace(strategy, "load_checkpoint", load_checkpoint),
        replace(strategy, "load_model_state_dict", load_model_state_dict),
    ]

    return partial(_undo_each, undo)


def _take_over_folders(trainer: Trainer, states: dict[str, dict[str, Any]]) -> None:
    """Checkpoints go where rank 0 puts them: the version of a logger, say, has a newer number here."""
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
            callback.dirpath = states[callback.state_key]["dirpath"]


def begin_amid(trainer: Trainer, begun: Callable[[], None]) -> Callable[[], None]:
    """Let the loops, which are restored, go on between two batches, where Lightning looks for what was broken off.

    Its epoch has begun for the others, and hooks of ``on_train_epoch_start`` run for this process too, which has seen
    nothing of it.

    Args:
        trainer: whose loops.
        begun: called once ``on_train_start`` is over.

    Returns:
        What undoes it; it undoes itself once the loops go on.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    on_run_start, on_advance_start, reset = fit_loop.on_run_start, fit_loop.on_advance_start, loop.reset

    def start() -> None:
        on_run_start()
        begun()

    def start_epoch() -> None:
        on_advance_start()
        call._call_callback_hooks(trainer, "on_train_epoch_start")
        call._call_lightning_module_hook(trainer, "on_train_epoch_start")

    def reset_nothing() -> None:
        reset()
        loop.restarting = fit_loop._restarting = False  # the setter of the latter makes True of it with max_steps
        loop.reset_restart_stage()
        _undo_each(undo)

    undo = [
        replace(fit_loop, "on_run_start", start),
        replace(fit_loop, "on_advance_start", start_epoch),
        replace(loop, "reset", reset_nothing),
    ]

    return partial(_undo_each, undo)


def _undo_each(undo: Sequence[Callable[[], None]]) -> None:
    for one in undo:
        one()
