"""Run by every Python that a script of the tests starts: two thirds of what such a short process costs are saved.

All of that is the import of lightning. It imports torchmetrics, which imports scipy, matplotlib and transformers where
they are installed, for metrics and plots that no script here has: it is told that they are not, as where a user has
installed nothing but this package. All others find them. And the garbage collector walks a dozen times through all of
the modules while they are imported, and three times at the end: until then it is kept from it, and afterwards it leaves
them alone, and looks after what the script makes as it always does.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

OPTIONAL = ("matplotlib", "scipy", "transformers")
THRESHOLDS = gc.get_threshold()


def asked_by_torchmetrics() -> bool:
    """Whether torchmetrics is what imports, and not e.g. scikit-learn."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("importlib", "lightning_utilities"):
            return package == "torchmetrics"
        frame = frame.f_back
    return False


def freeze_after(spec: Any) -> None:
    """Have what is there once ``spec`` has been imported left alone by the garbage collector."""
    load = spec.loader.exec_module

    def exec_module(module: Any) -> None:
        load(module)
        gc.freeze()
        gc.set_threshold(*THRESHOLDS)

    spec.loader.exec_module = exec_module


class Finder:
    """Finds what ``finder`` does, and for torchmetrics none of ``OPTIONAL``."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in OPTIONAL and asked_by_torchmetrics():
            return None
        spec = self._finder.find_spec(name, path, target)
        if name == "lightning" and spec is not None:
            freeze_after(spec)
        return spec

    def find_distributions(self, context: Any) -> Iterator[Any]:
        if context.name in OPTIONAL and asked_by_torchmetrics():
            return iter(())
        return self._finder.find_distributions(context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


gc.set_threshold(*THRESHOLDS[:2], 1000)
sys.meta_path[:] = [Finder(finder) if hasattr(finder, "find_distributions") else finder for finder in sys.meta_path]
