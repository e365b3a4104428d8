"""A few numbers of every sample, by which two stages see whether they have read the same batch.

Not a hash: the stages may run on unlike processors, whose floating-point results differ in the last digits.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUDGET = 1 << 18
"""How many elements of a tensor are read at most, evenly over all samples."""
_ROWS = 512  # of numbers per tensor; more samples than that are summed up, each with a weight of its own
_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the root of the sum of squares
_TOLERANCE_OTHERS = 1e-4

Fingerprint = list[Any]
"""One entry per value: ``[path, description, numbers, scales]``."""


def fingerprint(batch: Any) -> Fingerprint:
    """Return what is told of ``batch``: nested mappings, sequences, dataclasses of tensors, arrays and plain values.

    The order of the samples counts.
    """
    return [[path, *_entry(value)] for path, value in _leaves("", batch)]


def difference(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """Return what differs; ``None`` if it is the same batch.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.alike.fingerprint import difference, fingerprint
        >>> one, other = ({"image": torch.full((2, 3), value), "name": "x"} for value in (1.0, 2.0))
        >>> difference(fingerprint(one), fingerprint(one)) is None
        True
        >>> difference(fingerprint(one), fingerprint(other))
        "the values of ['image'] (float32 (2, 3))"
    """
    for one, other in zip(mine, theirs, strict=False):
        if one[:2] != other[:2]:
            return f"{one[0] or 'the batch'}: {one[1]}, and {other[0] or 'the batch'}: {other[1]}"
        if not _alike(one, other):
            return f"the values of {one[0] or 'the batch'} ({one[1]})"
    if len(mine) != len(theirs):
        return f"{len(mine)} values, and {len(theirs)}"
    return None


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(f"{path}[{key!r}]", value[key])
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value):
            yield from _leaves(f"{path}[{index}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{path}.{field.name}", getattr(value, field.name, None))
    else:
        yield path, value


def _entry(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return [kind, *_of_tensor(value)]
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return [type(value).__name__, hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), b""]
    return [type(value).__name__, b"", b""]  # an object of the user's: what of it matters is told by the body's inputs


def _of_tensor(tensor: Tensor) -> tuple[bytes, bytes]:
    """Return two weighted sums of each sample's elements, and by how much those of the same sample may differ."""
    tensor = _dense(tensor.detach())
    if tensor.numel() == 0:
        return b"", b""
    floating = tensor.is_floating_point()
    sample = _sampled(tensor).cpu().to(torch.float64 if floating else torch.int64)
    tolerance = _TOLERANCE.get(tensor.dtype, _TOLERANCE_OTHERS)
    rows, columns = sample.shape
    groups = -(-rows // _ROWS)
    weights = _weights(columns, 2).to(sample.dtype)
    of_rows = _weights(groups, 1).to(sample.dtype)[:, 0] if groups > 1 else None
    sums = _grouped(_times(sample, weights), of_rows)
    if not floating:
        return sums.numpy().tobytes(), b""
    squares = _grouped(_times(sample.square(), weights.square()), None if of_rows is None else of_rows.square())
    return sums.numpy().tobytes(), (tolerance * squares.sqrt()).to(torch.float32).numpy().tobytes()


def _alike(one: list[Any], other: list[Any]) -> bool:
    if not one[3] or not other[3]:
        return bool(one[2:] == other[2:])
    mine, theirs = (np.frombuffer(entry[2]) for entry in (one, other))
    scale = np.frombuffer(one[3], dtype=np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = np.abs(mine - theirs) <= scale
    return bool((near | (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))).all())


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        return tensor.values().flatten()
    if tensor.layout != torch.strided:
        tensor = tensor.to_sparse_coo().coalesce().values()  # type: ignore[no-untyped-call]
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _sampled(tensor: Tensor) -> Tensor:
    """Return (samples, elements), of large tensors evenly strided ones."""
    if tensor.dim() == 0:
        return tensor.view(1, 1)
    rows = tensor.shape[0]
    if rows > BUDGET:
        tensor = tensor[:: -(-rows // BUDGET)]
    columns = tensor[0].numel()
    step = -(-columns * tensor.shape[0] // BUDGET)
    if step <= 1:
        return tensor.reshape(tensor.shape[0], -1)
    step |= 1  # not in step with the width of an image
    if tensor.is_contiguous():
        return tensor.view(tensor.shape[0], -1)[:, ::step]
    indices = torch.unravel_index(torch.arange(0, columns, step, device=tensor.device), tensor.shape[1:])
    index: Any = (slice(None), *indices)
    chosen: Tensor = tensor[index]  # reshaping would copy the whole
    return chosen


def _weights(count: int, kinds: int) -> Tensor:
    """Return odd integers that look random, the same ones in every process."""
    mixed = torch.arange(1, count * kinds + 1) * 0x9E3779B1 % (1 << 32)
    return ((mixed ^ (mixed >> 15)) * 0x85EBCA6B % (1 << 32) >> 16).remainder(255).view(count, kinds) - 127 | 1


def _times(sample: Tensor, weights: Tensor) -> Tensor:
    if sample.is_floating_point():
        return sample @ weights
    return torch.stack([(sample * weights[:, kind]).sum(1) for kind in range(weights.shape[1])], 1)


def _grouped(sums: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return sums
    padding = -len(sums) % len(weights)
    padded = torch.cat([sums, sums.new_zeros(padding, sums.shape[1])]).view(-1, len(weights), sums.shape[1])
    return (padded * weights[None, :, None]).sum(1)
