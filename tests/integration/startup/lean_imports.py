"""Lightning imports much that hardly a test needs, and that is three quarters of what importing it costs.

It imports torchmetrics, which imports scipy, matplotlib and transformers where they are installed, for metrics and
plots that no test has: torchmetrics is told that they are not there, as where a user has installed nothing but this
package. All others find them. And it imports the compiler, to know a compiled module when it sees one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OPTIONAL = ("matplotlib", "scipy", "transformers")


def _nothing() -> None:
    pass


def install(before_lightning: Callable[[], None] = _nothing, after_lightning: Callable[[], None] = _nothing) -> None:
    """Have torchmetrics find none of them from now on.

    Args:
        before_lightning: called when lightning is about to be imported.
        after_lightning: called when it has been.
    """
    sys.meta_path[:] = [
        Finder(finder, before_lightning, after_lightning) if hasattr(finder, "find_distributions") else finder
        for finder in sys.meta_path
    ]


def postpone_compiler() -> None:
    """Have the compiler imported once somebody compiles, as the parameter server has."""
    path = Path(__file__).parents[3] / "lightning_stale" / "private" / "of_dynamo.py"
    spec = importlib.util.spec_from_file_location("of_dynamo", path)  # whose package would import lightning
    assert spec is not None
    of_dynamo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(of_dynamo)
    of_dynamo.postpone()
    stand_in = sys.modules["torch._dynamo"]
    if not hasattr(stand_in, "__file__"):
        known = {"OptimizedModule": OptimizedModule, "trace_rules": SimpleNamespace(clear_lru_cache=_nothing)}
        vars(stand_in).update(known, utils=_Utils())  # what Lightning asks for, a process group that begins, and DDP
        _postpone_its_determinism(sys.modules["torch"])


def _postpone_its_determinism(torch: Any) -> None:
    """Have nothing told to the compiler that it does by default: Lightning does, in each process that it spawns."""
    whole = torch.use_deterministic_algorithms

    def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
        if mode or "torch._inductor" in sys.modules:
            whole(mode, warn_only=warn_only)
        else:
            torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)

    torch.use_deterministic_algorithms = use_deterministic_algorithms


class _Utils:
    """Stands for ``torch._dynamo.utils``."""

    @staticmethod
    def get_optimize_ddp_mode() -> str:
        return "ddp_optimizer"  # the default

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch._dynamo.utils"), name)


class _Compiled(type):
    def __instancecheck__(cls, thing: Any) -> bool:
        there = sys.modules.get("torch._dynamo.eval_frame")
        return there is not None and isinstance(thing, there.OptimizedModule)


class OptimizedModule(metaclass=_Compiled):
    """Whatever is an instance of ``torch._dynamo.OptimizedModule``: nothing before it has been imported."""


def asked_by_torchmetrics() -> bool:
    """Whether torchmetrics is what imports, and not e.g. scikit-learn."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("importlib", "lightning_utilities"):
            return package == "torchmetrics"
        frame = frame.f_back
    return False


class Finder:
    """Finds what ``finder`` does, and for torchmetrics none of ``OPTIONAL``."""

    def __init__(self, finder: Any, before_lightning: Callable[[], None], after_lightning: Callable[[], None]) -> None:
        self._finder = finder
        self._before_lightning, self._after_lightning = before_lightning, after_lightning

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in OPTIONAL and asked_by_torchmetrics():
            return None
        spec = self._finder.find_spec(name, path, target)
        if name == "lightning" and spec is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                self._before_lightning()
                load(module)
                self._after_lightning()

            spec.loader.exec_module = exec_module
        return spec

    def find_distributions(self, context: Any) -> Iterator[Any]:
        if context.name in OPTIONAL and asked_by_torchmetrics():
            return iter(())
        return self._finder.find_distributions(context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)
