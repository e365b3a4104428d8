"""``torch._dynamo`` is imported once somebody compiles, and not by every optimizer's first step (read in torch 2.13).

torch asks it to break the graph around each step, and half of the time in which the parameter server starts would go
into importing it, and sympy with it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


def postpone() -> None:
    """Let a stand-in say what is true as long as nothing is compiled; asked for more, it makes room for the module.

    Call it before the first step. Where it has been imported already, nothing is changed.
    """
    if _NAME not in sys.modules:
        stand_in = _StandIn(_NAME)
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in


class _StandIn(ModuleType):
    @staticmethod
    def graph_break(msg: str = "") -> None:
        """There is no graph."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
        """Nothing is compiled."""
        return _unchanged if fn is None else fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            torch._dynamo = importlib.import_module(_NAME)
        return getattr(sys.modules[_NAME], name)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
