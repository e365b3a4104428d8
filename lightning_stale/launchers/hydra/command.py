"""What starts another rank of a Hydra job: the same app, with the very config of this rank."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf, flag_override

from lightning_stale.private import of_hydra

_LOKY = "joblib.externals.loky"


def rank_command(config_file: Path) -> list[str]:
    """Return the command of :mod:`~lightning_stale.launchers.hydra.rank` for one whose config is in ``config_file``."""
    return [sys.executable, "-m", "lightning_stale.launchers.hydra.rank", str(os.getpid()), str(config_file), *_app()]


def rank_environment() -> dict[str, str]:
    """Return the environment of a rank: this one's, with this one's ``sys.path``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)}


def save_config(file: Path) -> None:
    """Save the config of the job for ranks that log to the console: the log file is rank 0's.

    Not ``.hydra/config.yaml``, which lacks the types, the choices and the number of the job, and need not exist.
    """
    config = copy.deepcopy(of_hydra.whole_config())
    with flag_override(config.hydra, ["readonly", "struct"], False):
        config.hydra.job_logging = _console_only(config.hydra.job_logging)
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(config)
    file.write_bytes(buffer.getvalue())


def _app() -> list[str]:
    """Return how the app was started: ``[script]`` or ``["-m", module]``."""
    spec = sys.modules["__main__"].__spec__
    script = Path(to_absolute_path(sys.argv[0]))
    if spec is not None and not spec.name.startswith(_LOKY):
        return ["-m", spec.name]
    if spec is None or str(script.parent) in sys.path:
        return [str(script)]
    # joblib's workers get sys.argv and sys.path of the process that has started them, and another __main__
    parents = [Path(path) for path in sys.path if path and script.is_relative_to(path)]
    if not parents:
        return [str(script)]
    name = script.relative_to(max(parents, key=lambda path: len(path.parts))).with_suffix("")
    return ["-m", ".".join(name.parts)]


def in_joblib_worker() -> bool:
    """Whether this process is one of those in which Hydra's joblib launcher runs jobs."""
    spec = sys.modules["__main__"].__spec__
    return spec is not None and spec.name.startswith(_LOKY)


def _console_only(logging: Any) -> Any:
    if logging is None:
        return None
    plain: dict[str, Any] = OmegaConf.to_container(logging, resolve=False)  # type: ignore[assignment]
    handlers: dict[str, Any] = plain.get("handlers") or {}
    files = {name for name, handler in handlers.items() if "filename" in handler}
    plain["handlers"] = {name: handler for name, handler in handlers.items() if name not in files}
    for owner in (plain.get("root"), *(plain.get("loggers") or {}).values()):
        if owner and owner.get("handlers"):
            owner["handlers"] = [name for name in owner["handlers"] if name not in files]
    return DictConfig(plain)


def _named(module: str, name: str) -> Any:
    """Return what ``module`` calls ``name``."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


class _Pickler(pickle.Pickler):
    """Pickles classes by their names, be they copies: joblib makes them of the app's, and Hydra of its plugins'."""

    def reducer_override(self, obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | Any:
        if isinstance(obj, type) and obj.__module__ != "builtins" and "<locals>" not in obj.__qualname__:
            return _named, (obj.__module__, obj.__qualname__)
        return NotImplemented
