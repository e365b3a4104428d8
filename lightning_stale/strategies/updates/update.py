"""What a strategy asks of the way in which the weights of a rank are updated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.events import Event
from lightning_stale.strategies.other_ranks import OtherRanks
from lightning_stale.topology import Topology

_T = TypeVar("_T")


@dataclass(frozen=True)
class Training:
    """What an update is given when training starts: weights and optimizers are final by then."""

    run: str
    """A name that no other training has, the same on all ranks."""
    rank: int
    topology: Topology
    others: OtherRanks
    module: LightningModule
    optimizers: Sequence[Optimizer]
    device: torch.device
    main_address: str
    """Where global rank 0 is reached."""
    timeout: timedelta
    """For ranks to find each other."""
    check_signals: Callable[[], None]
    """Raises if this rank is to end; called while it waits."""
    record: Callable[[Event], None]
    """Is told what happens on this rank."""


class Update(ABC):
    """From a gradient to new weights: the same calls in the same order, whoever computes them.

    ``start``, then per batch ``before_batch``, ``step`` for each optimizer's step, ``after_batch``; ``meet`` now and
    then, and ``finish``. Weights change in ``step``, ``after_batch`` and ``meet`` only: never under a live graph.
    ``release`` may come at any time after a failure. The same object may start again.
    """

    running = False
    """Whether between ``start`` and ``finish``."""
    members: tuple[tuple[int, int], ...] = ()
    """(rank, generation) of those whom the last meeting has let go on, in a run that may lose ranks."""

    @abstractmethod
    def start(self, training: Training) -> None:
        """Begin with the weights and optimizers of ``training``, the same on all ranks of a stage."""

    def before_batch(self) -> None:  # noqa: B027  # not everybody measures
        """Called before each training batch."""

    def step(self, take: Callable[[], _T]) -> _T:
        """Run ``take``, in which an optimizer takes its step."""
        return take()

    @abstractmethod
    def after_batch(self) -> None:
        """Called after each training batch, outside of the user's ``training_step``."""

    @abstractmethod
    def meet(self, place: str) -> None:
        """Have the same weights on all ranks of a stage, once all are at ``place``."""

    def recover(self) -> None:  # noqa: B027  # mostly they are here
        """Have the newest weights that can be had without waiting for anybody: the run has been interrupted."""

    def after_validation(self) -> None:  # noqa: B027  # mostly nobody looks
        """Called after each validation: a callback may have swapped weights for it, and back."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return ``state_dict()`` of ``optimizer`` on rank 0; ``None`` if it is here, and as it is."""
        return None

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any] | None:
        """Return the entry of a checkpoint, as of now or of the end of training; ``None`` before it has started."""

    @abstractmethod
    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        """Begin the next training from ``entry``; ``None``: the checkpoint has none."""

    @abstractmethod
    def finish(self) -> None:
        """Training is over, and all have met."""

    @abstractmethod
    def release(self) -> None:
        """Let go of everything that is left; the model keeps the weights it has. Called again, it does nothing."""


def unique_parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return the parameters of all ``optimizers``, each once, in the order of the optimizers and their param groups."""
    parameters: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameters.setdefault(id(parameter), parameter)
    return list(parameters.values())


def names_of(module: nn.Module, parameters: Sequence[Tensor]) -> list[str]:
    """Return what ``module`` calls each of the ``parameters`` of its optimizers."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names.get(id(p), f"parameter {place} of the optimizers") for place, p in enumerate(parameters)]
