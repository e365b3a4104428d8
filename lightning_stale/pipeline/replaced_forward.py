"""What stands for the forward of a module while it is cut."""

from __future__ import annotations

import copy
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
