"""A model that was built on the meta device, where it has shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_stale.pipeline.divided.tensors import adopt, named_tensors, tensors_of
from lightning_stale.private.of_torch import versions_of


def on_meta(model: nn.Module) -> list[str]:
    """Return the names of the tensors that have no values."""
    return [name for name, tensor in named_tensors(model) if tensor.is_meta]


def initialize(model: nn.Module, hook: Callable[[], object]) -> None:
    """Give what is on the meta device memory on the CPU, and the values that ``hook`` writes there.

    Raises:
        ValueError: names a tensor that the hook has left out.
    """
    absent = set(on_meta(model))
    held = dict(named_tensors(model))
    adopt(model, {name: _blank(held[name]) for name in absent}, torch.device("cpu"))
    before = {name: (tensor, versions_of([tensor])) for name, tensor in tensors_of(model, absent).items()}
    with torch.no_grad():
        hook()
    after = tensors_of(model)
    for name, (tensor, version) in before.items():
        now = after.get(name)
        if now is tensor and versions_of([now]) == version and _is_blank(now):
            raise ValueError(
                f"init_weights() has left {name!r} without a value, which was on the meta device: give every "
                "parameter and buffer its value there"
            )


def assign(model: nn.Module, values: Mapping[str, Tensor]) -> set[str]:
    """Let what is on the meta device be ``values``, by name, which may lie in a mapped file; return the names."""
    found = {name: values[name] for name in on_meta(model) if name in values}
    like = dict(named_tensors(model))
    adopt(model, {name: value.to(like[name].dtype) for name, value in found.items()}, torch.device("cpu"))
    return set(found)


def _blank(like: Tensor) -> Tensor:
    blank = torch.zeros(like.shape, dtype=like.dtype)
    if like.is_floating_point() or like.is_complex():
        return blank.fill_(float("nan"))
    return blank if like.dtype == torch.bool else blank.fill_(torch.iinfo(like.dtype).min)


def _is_blank(tensor: Tensor) -> bool:
    blank = _blank(tensor)
    return bool((tensor.isnan() if blank.isnan().any() else tensor == blank).any()) and tensor.numel() > 0
