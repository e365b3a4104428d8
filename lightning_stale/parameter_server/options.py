"""The current values of an optimizer's param groups, which travel with every push (schedulers run in the workers)."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Options = list[dict[str, Any]]
_AS_THEY_ARE = frozenset({bool, int, float, str, type(None)})


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


@contextmanager
def scaled_learning_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Have the learning rate of every param group multiplied by ``factor`` for one step.

    What a step itself does to its learning rate (a decay, say) stays, in proportion.

    Raises:
        ValueError: for a factor other than 1 if a param group has no learning rate.
    """
    if factor == 1.0:
        yield
        return
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no 'lr' in its param groups, and the apply rule returned "
            f"Step(lr_factor={factor}): write lr_factor=1.0, or another optimizer"
        )
    before = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = rate * factor  # a new tensor, where it is one: several groups may share theirs
    given = [float(group["lr"]) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, rate, value in zip(optimizer.param_groups, before, given, strict=True):
            now = float(group["lr"])
            if now == value:
                group["lr"] = rate
            elif value != 0:
                group["lr"] = rate * (now / value)


def changed_options(before: Options, after: Options) -> set[tuple[int, str]]:
    """Return (group, name) of the values that are in ``after`` and differ from ``before``."""
    return {
        (index, name)
        for index, (old, new) in enumerate(zip(before, after, strict=True))
        for name, value in new.items()
        if name not in old or old[name] != value
    }


def _is_plain(value: Any) -> bool:
    if type(value) in _AS_THEY_ARE:  # all but always; asking ``numbers`` for it costs 20 us a push
        return True
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (str, numbers.Real))  # NumPy's numbers are Real too


def _plain(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
