"""Makes ``Trainer(strategy="dssp")`` work in every Hydra app: its config can name a strategy without an import.

Lightning looks for names in a registry of the process. The names are put there once Lightning is imported, be it before
or after this module is, and ``lightning_stale`` itself is imported when one of them is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

NAMES = tuple(
    f"{name}{ending}"
    for name in ("bsp", "asp", "ssp", "dssp", "bounded-delay", "dsp", "hpsgd")
    for ending in ("", "_spawn", "_fork", "_notebook")
)
_REGISTRIES = ("lightning.pytorch.strategies", "pytorch_lightning.strategies")  # lightning_stale refuses the second


def register_names() -> None:
    """Register the names where Lightning is imported, and see to it that they are where it is imported later."""
    for module in _REGISTRIES:
        if hasattr(sys.modules.get(module), "StrategyRegistry"):
            _register(sys.modules[module])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    for name in NAMES:
        if name not in registry:
            registry.register(name, partial(_make, registry, name), description="of lightning-stale")


def _make(registry: Any, name: str) -> Any:
    importlib.import_module("lightning_stale")  # registers what the name stands for
    return registry.get(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls :func:`_register` when the strategies of Lightning are imported; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
