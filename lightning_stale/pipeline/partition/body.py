"""Which module of a model is partitioned, and what lies outside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_stale.pipeline.partition.costs import count_parameters
from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.private.of_modules import unwrap, without_wrappers


def find_body(model: nn.Module, name: str | None, sequential: bool) -> str:
    """Return the name of the module to partition.

    Args:
        model: the LightningModule.
        name: what the user has asked for, e.g. ``"model.body"``.
        sequential: without a name, choose the ``nn.Sequential`` with most parameters; or else the child with most.

    Raises:
        PartitionError: if there is none, with the alternatives.
    """
    modules = {path: unwrap(module) for path, module in model.named_modules() if path}
    if name is not None:
        if name not in modules:
            near = ", ".join(repr(path) for path in list(modules)[:8])
            raise PartitionError(f"module={name!r} is not a module of {type(model).__name__}: it has {near}, ...")
        return name
    kind: Any = nn.Sequential if sequential else nn.Module
    candidates = [path for path, module in modules.items() if isinstance(module, kind)]
    if not sequential:
        candidates = [path for path in candidates if "." not in path]
    if not candidates:
        raise PartitionError(
            f"{type(model).__name__} has no nn.Sequential to cut: write DSPStrategy(split=['layer2', 'layer3']) with "
            "the names of the submodules that start a block, DSPStrategy(module='...') with the name of the one to "
            "cut, or define configure_stages() in the LightningModule"
        )
    best: str = max(candidates, key=lambda path: count_parameters(modules[path]))
    return best


def resolve(model: nn.Module, name: str | None, names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the module to partition, and ``names`` relative to it.

    Args:
        model: the LightningModule.
        name: what the user has asked for; by default :func:`find_body` chooses.
        names: of the submodules that start a block, from the root of ``model`` or relative to that module.
    """
    names = [without_wrappers(start) for start in names]
    if name is None and names:
        roots = {start.partition(".")[0] for start in names if "." in start}
        children = dict(model.named_children())
        chosen = find_body(model, None, sequential=False)
        if not _are_within(unwrap(children[chosen]), names) and len(roots) == 1 and roots <= children.keys():
            (name,) = roots
    path = find_body(model, name, sequential=not names)
    body = unwrap(model.get_submodule(path))
    relative = [start.removeprefix(f"{path}.") for start in names]
    return path, relative if not _are_within(body, names) and _are_within(body, relative) else list(names)


def _are_within(body: nn.Module, names: Sequence[str]) -> bool:
    return set(names) <= {path for path, _ in body.named_modules()}


def outside(model: nn.Module, owner: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of ``model`` that are not those of ``owner``, which is partitioned."""
    within = [path for path, module in model.named_modules(remove_duplicate=False) if module is owner]
    return [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(path == "" or name.startswith(f"{path}.") for path in within)
    ]
