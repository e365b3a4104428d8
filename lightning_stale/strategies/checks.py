"""What cannot work is refused before training starts, with what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, Timer
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_stale.private import of_lightning, of_torch


def check_trainer(trainer: Trainer) -> None:
    """Refuse what makes the workers meet at every batch.

    Raises:
        MisconfigurationException: names the argument, and the one to use.
    """
    if any(
        isinstance(callback, Timer) and of_lightning.limits_time_by_batch(callback)
        for callback in of_lightning.callbacks(trainer)
    ):
        raise MisconfigurationException(
            "Trainer(max_time=...) and the Timer callback make all workers meet at every batch, which bounded "
            "staleness is there to avoid: write Trainer(callbacks=[Timer(duration, interval='epoch')]), which ends "
            "training at the end of an epoch, Trainer(max_steps=...) or Trainer(max_epochs=...)"
        )
    for callback in of_lightning.callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and of_lightning.saves_by_time(callback):
            raise MisconfigurationException(
                "ModelCheckpoint(train_time_interval=...) makes all workers meet at every batch: write "
                "ModelCheckpoint(every_n_train_steps=...) or ModelCheckpoint(every_n_epochs=...)"
            )
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"{type(callback).__name__} gives the optimizer further parameters while training runs, and only those "
                "that it started with are known elsewhere: give it all parameters in configure_optimizers(), and set "
                "requires_grad=False until they are to learn"
            )
    if of_lightning.validates_by_time(trainer):
        raise MisconfigurationException(
            "a val_check_interval in time lets the workers start validation at different batches, and they wait for "
            "each other for ever: write a number of batches or a fraction of the epoch, e.g. val_check_interval=0.5"
        )


def check_notebook(works: bool, strategy: str, name: str) -> None:
    """Refuse, in a notebook, processes that run a script.

    Args:
        works: whether the strategy's launcher works in a notebook.
        strategy: the name of its class.
        name: the name to write instead.

    Raises:
        MisconfigurationException: with the name.
    """
    if of_lightning.in_notebook() and not works:
        raise MisconfigurationException(
            f"a notebook has no script that further processes could run: write Trainer(strategy={name!r}), or with "
            f"options {strategy}(..., start_method='fork'), before anything in it uses a GPU; or Trainer(devices=1)"
        )


def check_not_elastic(value: object, strategy: str, reason: str) -> None:
    """Refuse ``elastic=`` where a run ends when a worker is lost, whatever is done.

    Args:
        value: what was given; ``False``: nothing is wished for.
        strategy: the name of its class.
        reason: why so.

    Raises:
        ValueError: with what to do instead.
    """
    if value is not False:
        raise ValueError(
            f"{strategy}(elastic={value!r}): {reason}. Leave elastic= out, and start the script with 'python -m "
            "lightning_stale run', which lets a run that has failed go on from its newest checkpoint; or write "
            "StaleSyncStrategy(elastic=True)"
        )


def check_elastic_environment(elastic: object) -> None:
    """Refuse to run elastic where workers cannot die alone, or nobody can take their place.

    Args:
        elastic: what was asked for.

    Raises:
        MisconfigurationException: with what to do instead.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise MisconfigurationException(
            f"elastic={elastic!r} under torchrun, which ends all workers when one of them dies: start the script by "
            "itself ('python train.py'), and it starts and replaces its workers; or write elastic=False and 'torchrun "
            "--max-restarts=3', under which a run that has failed goes on from its newest checkpoint"
        )
    if of_lightning.in_notebook():
        raise MisconfigurationException(
            f"elastic={elastic!r} in a notebook, which has no script that another worker could run: write "
            "elastic=False, or train in a script"
        )


def check_device(device: torch.device) -> None:
    """Refuse a device without a way to the server.

    Raises:
        MisconfigurationException: with the devices that work.
    """
    if device.type not in ("cpu", "cuda"):
        raise MisconfigurationException(
            f"workers cannot run on {device.type!r}: write Trainer(accelerator='cpu') or Trainer(accelerator='gpu') "
            "with an NVIDIA or AMD GPU"
        )


def check_model(model: nn.Module, synchronizes_batch_norm: bool, sparse_gradients: bool) -> None:
    """Refuse modules that need what the workers do not share.

    Args:
        model: the user's.
        synchronizes_batch_norm: whether ``Trainer(sync_batchnorm=True)``.
        sparse_gradients: whether they can be used.

    Raises:
        MisconfigurationException: names the module and the cure.
    """
    check_batch_norm(model, synchronizes_batch_norm)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and not sparse_gradients:
            raise MisconfigurationException(
                f"{name} is an {type(module).__name__}(sparse=True), and sparse gradients cannot be pushed: write "
                f"{type(module).__name__}(sparse=False)"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise MisconfigurationException(
                f"{name} has parameters without a shape yet: run one batch through the model in configure_model()"
            )


def check_batch_norm(model: nn.Module, synchronizes_batch_norm: bool) -> None:
    """Refuse batch norm over all workers.

    Args:
        model: the user's.
        synchronizes_batch_norm: whether ``Trainer(sync_batchnorm=True)``.

    Raises:
        MisconfigurationException: names the module and the cure.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) or (synchronizes_batch_norm and of_torch.is_batch_norm(module)):
            raise MisconfigurationException(
                f"{name or 'the model'} is a SyncBatchNorm (or sync_batchnorm=True), which makes the workers meet in "
                "every forward pass: write Trainer(sync_batchnorm=False) and plain BatchNorm, whose running statistics "
                "are averaged before validation and checkpoints, or GroupNorm"
            )


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimizers whose step needs more than one gradient.

    Raises:
        MisconfigurationException: names the optimizer and the cure.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times within one step, for which a server or a pipeline has one "
                "gradient only: write another optimizer, e.g. torch.optim.AdamW, or another strategy: "
                "Trainer(strategy='hpsgd'), or Trainer(strategy='auto', devices=1)"
            )


def check_validation_batches(trainer: Trainer) -> None:
    """Refuse a validation with different numbers of batches per rank, in which metrics would wait for ever.

    Raises:
        MisconfigurationException: with the numbers.
    """
    batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    if trainer.world_size == 1 or any(count == float("inf") for count in batches):
        return
    mine = torch.tensor([int(count) for count in batches], device=trainer.strategy.root_device)  # one per loader
    everyone = trainer.strategy.all_gather(mine).tolist()
    if any(counts != everyone[0] for counts in everyone):
        counts = ", ".join(f"rank {rank}: {'+'.join(map(str, counts))}" for rank, counts in enumerate(everyone))
        raise MisconfigurationException(
            f"the ranks have different numbers of validation batches ({counts}): leave "
            "Trainer(use_distributed_sampler=True), or write Trainer(limit_val_batches="
            f"{min(map(min, everyone)) or 1}) so that all have as many"
        )


def check_pipeline(trainer: Trainer) -> None:
    """Refuse what cannot be done block by block.

    Raises:
        MisconfigurationException: with what to write instead.
    """
    if not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            "DSP steps each block on its own, which manual optimization and several optimizers cannot: set "
            "automatic_optimization = True and return one optimizer (with param groups) from configure_optimizers()"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "precision='16-mixed' scales the loss, and the scale of one stage is not that of another: write "
            "precision='bf16-mixed'"
        )
