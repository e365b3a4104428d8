"""``lightning`` and ``pytorch_lightning`` are two copies of the same code: users of the twin learn what to import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

_TWIN = "pytorch_lightning"
_MESSAGE = (
    "lightning_stale works with the package `lightning`, and this Trainer is from its twin `pytorch_lightning`, whose "
    "classes are different ones: write `from lightning import LightningModule, Trainer` (or `import lightning as L`) "
    "everywhere instead of `import pytorch_lightning`"
)


class TwinPackageError(ImportError):
    """A strategy of this package met ``pytorch_lightning`` instead of ``lightning``."""


def refuse_wrong_package(names: Iterable[str], strategy: type) -> None:
    """Make ``pytorch_lightning.Trainer(strategy="dssp")`` say what to import, now or once it is imported.

    Args:
        names: of all strategies.
        strategy: the class of them all.
    """

    def prepare(strategies: ModuleType) -> None:
        for name in names:
            strategies.StrategyRegistry.register(name, _refuse, description="of the package `lightning`", override=True)
        # so that an instance gets as far as `refuse_environment` instead of "invalid strategy name"
        strategies.Strategy.register(strategy)

    if f"{_TWIN}.strategies" in sys.modules:
        prepare(sys.modules[f"{_TWIN}.strategies"])
    elif not any(isinstance(finder, _TwinFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TwinFinder(prepare))


def refuse_environment(environment: object) -> None:
    """Raise if ``environment`` comes from the twin.

    Raises:
        TwinPackageError: says what to import.
    """
    if type(environment).__module__.split(".")[0] in (_TWIN, "lightning_fabric"):
        raise TwinPackageError(_MESSAGE)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TwinPackageError(_MESSAGE)


class _TwinFinder(importlib.abc.MetaPathFinder):
    """Calls ``prepare`` with the twin's strategies when they are imported; finds nothing itself."""

    def __init__(self, prepare: Callable[[ModuleType], None]) -> None:
        self._prepare = prepare

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"{_TWIN}.strategies":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_prepare(module: ModuleType) -> None:
                execute(module)
                self._prepare(module)

            spec.loader.exec_module = execute_and_prepare  # type: ignore[method-assign]
        return spec
