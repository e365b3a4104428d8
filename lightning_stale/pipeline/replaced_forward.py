"""What stands for the forward of a module while blocks replace it."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class ReplacedForward:
    """Leads calls of ``owner`` into the pipeline; a copy of the module, in a file or in memory, has its own forward.

    Args:
        owner: the module.
        run: is called with its arguments.
    """

    def __init__(self, owner: nn.Module, run: Callable[..., Any]) -> None:
        self._owner, self._run = owner, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(types.MethodType(type(self._owner).forward, self._owner), memo)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, "forward")  # of the class: when it is loaded, the instance has no other yet


def positional(owner: nn.Module) -> Callable[..., tuple[Any, ...]]:
    """Return what brings the arguments of a call of ``owner`` into the order of its signature, defaults included."""
    signature = inspect.signature(type(owner).forward)

    def bind(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        bound = signature.bind(owner, *args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[1:]

    return bind
