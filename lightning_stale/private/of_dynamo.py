"""``torch._dynamo`` is imported once somebody compiles, and not by every optimizer's first step (read in torch 2.13).

torch asks it to break the graph around each step, and half of the time in which the parameter server starts would go
into importing it, and sympy with it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


def postpone() -> None:
    """Let a stand-in say what is true as long as nothing is compiled; asked for more, it makes room for the module.

    Call it before the first step. Where it has been imported already, nothing is changed.
    """
    if _NAME not in sys.modules:
        torch._dynamo = sys.modules[_NAME] = _StandIn(_NAME)
        sys.meta_path.insert(0, _Submodules())


def _give_way() -> ModuleType:
    """Have the module itself where the stand-in was."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
    torch._dynamo = importlib.import_module(_NAME)
    return torch._dynamo


class _StandIn(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that one may ask for its submodules

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """There is no graph."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
        """Nothing is compiled."""
        return _unchanged if fn is None else fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_give_way(), name)


class _Submodules(MetaPathFinder, Loader):
    """Imports the whole package before a part of it, which must not be loaded a second time then."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{_NAME}."):
            return None
        sys.meta_path.remove(self)
        package = _give_way()
        there = sys.modules.get(fullname)
        if there is None:
            return PathFinder.find_spec(fullname, package.__path__)
        self._spec, spec = there.__spec__, ModuleSpec(fullname, self)
        vars(there)["__spec__"] = spec  # some of these modules refuse to have it set
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
