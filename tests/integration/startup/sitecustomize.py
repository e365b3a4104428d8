"""Run by every Python that a script of the tests starts: half of what such a short process costs is saved.

That is all importing. torchmetrics, which lightning imports, imports scipy, matplotlib and transformers where they are
installed, for metrics and plots that no script here has: it is told that they are not, as in an environment of a user
who has installed nothing but this package. Others find them. And the collector of garbage walks through all modules and
functions a dozen times on the way: such full collections are made rarer, the small ones stay.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

OPTIONAL = ("matplotlib", "scipy", "transformers")

gc.set_threshold(gc.get_threshold()[0], 10, 1000)


def asked_by_torchmetrics() -> bool:
    """Whether torchmetrics is what imports, and not e.g. scikit-learn."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("importlib", "lightning_utilities", "contextlib", "packaging"):
            return package == "torchmetrics"
        frame = frame.f_back
    return False


class Finder:
    """Finds what ``finder`` does, and for torchmetrics none of ``OPTIONAL``."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in OPTIONAL and asked_by_torchmetrics():
            return None
        return self._finder.find_spec(name, path, target)

    def find_distributions(self, context: Any) -> Iterator[Any]:
        if context.name in OPTIONAL and asked_by_torchmetrics():
            return iter(())
        return self._finder.find_distributions(context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


sys.meta_path[:] = [Finder(finder) if hasattr(finder, "find_distributions") else finder for finder in sys.meta_path]
