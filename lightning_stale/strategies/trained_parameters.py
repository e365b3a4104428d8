"""What the optimizers have trained is what the model holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer


class TrainedParameters:
    """The parameters of a model that its optimizers train, as they are when training starts.

    Args:
        model: the model; parameters on the meta device are another rank's.
        optimizers: those that train it here.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._model = model
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self._held = {
            name: parameter
            for name, parameter in model.named_parameters()
            if id(parameter) in trained and not parameter.is_meta
        }

    def check(self) -> None:
        """See to it that each is still there; one that has been deleted, or goes by another name now, may be.

        Raises:
            RuntimeError: names one in whose place is something else, which nobody has trained.
        """
        present = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in self._held.items():
            if id(parameter) not in present and _found(self._model, name) is not None:
                raise RuntimeError(
                    f"{name} is not the parameter any more that the optimizer has trained: something has put another "
                    "one in its place while fit ran. Change its values instead (parameter.data.copy_(...)), or tell "
                    "the optimizer of the new one"
                )


def _found(model: nn.Module, name: str) -> Any:
    held: Any = model
    for part in name.split("."):
        held = getattr(held, part, None)
    return held
