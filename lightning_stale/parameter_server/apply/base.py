"""The interface of an apply rule: what it is handed of a push, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class StalePush:
    """A gradient as it reaches the server, for one optimizer; the lists have an entry per parameter that has one.

    Where gradients are clipped or unscaled, the worker has done it: a rule sees them as the optimizer would.

    Args:
        worker: its rank.
        optimizer: the index of the optimizer.
        staleness: ``tau``, the updates (of all optimizers) that the server has made since the worker pulled.
        places: which parameters, as their places among those of all optimizers.
        gradients: theirs; the rule may change them in place if it says so in :attr:`ApplyRule.changes_gradients`.
        weights: ``w_now``, the server's weights; for reading only.
        then: see :attr:`weights_then`.
    """

    worker: int
    optimizer: int
    staleness: int
    places: Sequence[int]
    gradients: Sequence[Tensor]
    weights: Sequence[Tensor]
    then: Sequence[Tensor] | None = None

    @property
    def weights_then(self) -> Sequence[Tensor]:
        """``w_then``, the weights that the gradients were computed on; for reading only.

        Raises:
            RuntimeError: if the rule has not said that it needs them.
        """
        if self.then is None:
            raise RuntimeError("weights_then is kept for rules that ask for it: set needs_weights_then = True in yours")
        return self.then


@dataclass(frozen=True, eq=False)
class Step:
    """What the optimizer steps with.

    Args:
        gradients: one per gradient of the push, in its order.
        lr_factor: what the learning rate of every param group is multiplied with, for this step only.
    """

    gradients: Sequence[Tensor]
    lr_factor: float = 1.0


class ApplyRule(ABC):
    """Decides how the server uses a pushed gradient: as it is, changed, with another learning rate, or not at all.

    Of ``StaleSyncStrategy(apply=...)``. The rule is sent to the server's process when ``fit`` starts (by cloudpickle:
    its class may stand in your script), and its state lives there, and in checkpoints. A gradient that is not applied
    counts for the gate like any other, but is no update; its worker is told so with its OK, and pulls the newest
    weights.

    Example::

        >>> from lightning_stale import ApplyRule, StaleSyncStrategy, Step
        >>> class HalfWhenStale(ApplyRule):
        ...     def step(self, push):
        ...         return Step(push.gradients, lr_factor=0.5 if push.staleness > 10 else 1.0)
        >>> StaleSyncStrategy(paradigm="asp", apply=HalfWhenStale())
        StaleSyncStrategy(paradigm=ASP(), transport='auto', apply=HalfWhenStale())
    """

    needs_weights_then: ClassVar[bool] = False
    """Whether :attr:`StalePush.weights_then` is wanted. It costs the server a copy of the weights for each worker that
    is connected by TCP; those in shared memory are there anyway."""

    changes_gradients: ClassVar[bool] = False
    """Whether :meth:`step` changes gradients in place. It is then given copies where the worker may still need its own:
    in manual optimization, and of parameters that several optimizers have."""

    def begin(self, workers: int, optimizers: int) -> None:  # noqa: B027 - most have nothing to do
        """Called once, in the server, before the first push, with the number of workers and of optimizers."""

    @abstractmethod
    def step(self, push: StalePush) -> Step | None:
        """Return what to step with, or ``None`` to let this gradient go; called without gradients recorded."""

    def check(self, optimizers: Sequence[Optimizer]) -> None:  # noqa: B027
        """Refuse optimizers that the rule makes no sense with; called in the workers before training.

        Raises:
            ValueError: names the optimizer, and says what to write instead.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings, tensors, lists and dicts; empty if the rule never has any.

        Called before :meth:`begin` too, to see whether it has.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from ``state`` of such a rule; called after :meth:`begin`, whose numbers may be others than then."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def changed_rule_warning(rule: ApplyRule, saved: Mapping[str, Any] | None) -> str | None:
    """Return what to warn of where the checkpoint's rule is another one than ``rule``, or ``None``.

    Args:
        rule: before it has begun.
        saved: the entry ``"apply"`` of the server's snapshot; ``None`` in checkpoints of before there were rules.
    """
    of_checkpoint = "Plain" if saved is None else saved["rule"]
    held, kept = bool(saved and saved["state"]), bool(rule.state_dict())
    if held and not kept:
        return f"the state of the apply rule {of_checkpoint} in the checkpoint is left out: the rule is {rule!r} now"
    if kept and (not held or of_checkpoint != type(rule).__name__):
        return f"the apply rule {rule!r} starts anew: the checkpoint is of {of_checkpoint}, and has no state for it"
    return None
