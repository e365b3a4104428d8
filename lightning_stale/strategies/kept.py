"""What objects have gathered in plain attributes, kept for when it is to be undone: a list of outputs, a metric."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_stale.private import of_torch

_Restore = Callable[[], Any]


class Kept:
    """The plain attributes of some objects: numbers, texts, tensors, and lists, dicts and sets of anything.

    What lies in a container is not copied, unless it is one itself. Parameters, buffers and the modules' own
    attributes are left out.

    Args:
        owners: the objects, such as all modules of a model, with their metrics.

    Example::

        >>> from types import SimpleNamespace
        >>> from lightning_stale.strategies.kept import Kept
        >>> module = SimpleNamespace(outputs=[1], count=1, best=None)
        >>> kept = Kept([module])
        >>> module.outputs.append(2); module.count += 1; module.best = 0.5
        >>> kept.restore()
        >>> module
        namespace(outputs=[1], count=1, best=None)
    """

    def __init__(self, owners: Iterable[object]) -> None:
        own = vars(LightningModule()).keys()
        self._attributes: list[tuple[dict[str, Any], str, _Restore]] = [
            (vars(owner), name, _keep(value))
            for owner in owners
            for name, value in vars(owner).items()
            if name not in own and _is_plain(value)
        ]

    def restore(self) -> None:
        """Let the attributes be as they were; a plain one that has become something else stays that."""
        for attributes, name, restore in self._attributes:
            if name in attributes and _is_plain(attributes[name]):
                attributes[name] = restore()


_ATOMS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque)


def _is_plain(value: object) -> bool:
    return isinstance(value, (*_ATOMS, *_CONTAINERS, Tensor))


def _keep(value: Any) -> _Restore:
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if isinstance(value, dict):
        items = {key: _keep_inner(one) for key, one in value.items()}
        return lambda: _refill(value, lambda: value.update({key: restore() for key, restore in items.items()}))
    if isinstance(value, (list, deque)):
        elements = [_keep_inner(one) for one in value]
        return lambda: _refill(value, lambda: value.extend(restore() for restore in elements))
    if isinstance(value, set):
        members = set(value)
        return lambda: _refill(value, lambda: value.update(members))
    return lambda: value


def _keep_inner(value: Any) -> _Restore:
    return _keep(value) if isinstance(value, _CONTAINERS) else lambda: value


def _refill(container: Any, fill: Callable[[], None]) -> Any:
    container.clear()
    fill()
    return container


def _keep_tensor(tensor: Tensor) -> _Restore:
    copy = tensor.detach().clone()
    version = None if tensor.is_inference() else of_torch.versions_of([tensor])[0]

    def restore() -> Tensor:
        changed = version is None or of_torch.versions_of([tensor])[0] != version
        with torch.inference_mode(mode=False):
            return copy.clone() if changed else tensor

    return restore
