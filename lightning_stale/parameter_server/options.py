"""The current values of an optimizer's param groups, which travel with every push (schedulers run in the workers)."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Options = list[dict[str, Any]]


def read_options(optimizer: Optimizer) -> Options:
    """Return per param group what is a number, string, flag or a tuple of them: ``lr``, ``betas``, ``momentum`` ..."""
    return [
        {name: _plain(value) for name, value in group.items() if name != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def write_options(
    optimizer: Optimizer, options: Sequence[Mapping[str, Any]], keep: Collection[tuple[int, str]] = ()
) -> None:
    """Set the values that :func:`read_options` took from a worker's optimizer on the server's.

    Args:
        optimizer: the server's.
        options: the values, per param group.
        keep: (group, name) of those that the server's optimizer keeps itself.
    """
    for index, (group, values) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        for name, value in values.items():
            held = group.get(name)
            if (index, name) in keep:
                continue
            if isinstance(held, Tensor):
                held.fill_(value)
            elif name in ("capturable", "fused", "foreach"):  # how to compute, not what: the server's own choice
                continue
            else:
                group[name] = tuple(value) if isinstance(held, tuple) else value


def changed_options(before: Options, after: Options) -> set[tuple[int, str]]:
    """Return (group, name) of the values that are in ``after`` and differ from ``before``."""
    return {
        (index, name)
        for index, (old, new) in enumerate(zip(before, after, strict=True))
        for name, value in new.items()
        if name not in old or old[name] != value
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, numbers.Real))  # NumPy's numbers are Real too


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
