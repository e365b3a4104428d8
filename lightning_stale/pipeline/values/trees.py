"""What may travel between two stages, of one process as of two: trees of tensors and plain values.

A value is taken apart into its tensors and a *tree* of plain lists, and put together again from both: on the other side
of a process boundary, or with other tensors in the same process. What cannot cross a process is refused in one process
as well, with the same words.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_stale.private.of_torch import registered_node, uncoalesced

Tree = list[Any]
"""``[kind, ...]``: lists, strings, numbers and None, which every encoding can carry."""

_INT64 = range(-(2**63), 2**63)
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def take_apart(value: Any, objects: list[Any] | None = None) -> tuple[Tree, list[Tensor]]:
    """Return the tree of ``value`` and its tensors, in order.

    Args:
        value: tensors, dense or sparse, and plain values, in tuples, lists, dicts, named tuples, dataclasses and what
            is registered with torch's pytrees.
        objects: gets what is none of these, which then goes along as it is; ``None``: that is refused.

    Raises:
        TypeError: names the type that cannot travel, with what to write instead.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.values.trees import put_together, take_apart
        >>> tree, found = take_apart({"hidden": (torch.ones(2), 3)})
        >>> tree
        ['dict', [['plain', 'hidden'], ['tuple', ['tensor'], ['plain', 3]]]]
        >>> put_together(tree, [found[0] + 1])
        {'hidden': (tensor([2., 2.]), 3)}
    """
    found: list[Tensor] = []
    return _Apart(found, objects).tree(value), found


def put_together(tree: Tree, tensors: list[Tensor], objects: list[Any] | None = None) -> Any:
    """Return the value of ``tree`` with ``tensors`` in their places."""
    return _value(tree, iter(tensors), iter(objects or []))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with ``function`` of each of its tensors; what is no tree of tensors stays as it is."""
    objects: list[Any] = []
    tree, found = take_apart(value, objects)
    return put_together(tree, [function(tensor) for tensor in found], objects)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in ``value``; of a sparse one, those that it is made of."""
    return take_apart(value, [])[1]


class _Apart:
    """Takes one value apart."""

    def __init__(self, found: list[Tensor], objects: list[Any] | None) -> None:
        self._found, self._objects = found, objects

    def tree(self, value: Any) -> Tree:
        if isinstance(value, Tensor):
            return self._tensor(value)
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return ["plain", value]
        if kind is int:
            return ["plain", value] if value in _INT64 else ["integer", str(value)]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", value.type]  # the index is another one there
        if kind in (tuple, list, torch.Size):
            return [kind.__name__, *map(self.tree, value)]
        if kind is dict:
            return ["dict", *([self._plain(key), self.tree(child)] for key, child in value.items())]
        return self._instance(kind, value)

    def _instance(self, kind: type, value: Any) -> Tree:
        registered = registered_node(kind)
        if registered is not None:
            children, context = registered[0](value)
            return ["registered", self._name(kind), self._plain(context), *map(self.tree, children)]
        if _is_named_tuple(kind):
            return ["namedtuple", self._name(kind), *map(self.tree, value)]
        if dataclasses.is_dataclass(kind):
            held = {field.name: None for field in dataclasses.fields(kind) if hasattr(value, field.name)}
            names = list(held | getattr(value, "__dict__", {}))
            return ["dataclass", self._name(kind), names, *(self.tree(getattr(value, name)) for name in names)]
        cure = "torch.as_tensor() or .item()" if kind.__module__ == "numpy" else "its tensors in a tuple or a dict"
        return self._other(value, kind.__name__, f"return {cure}")

    def _tensor(self, tensor: Tensor) -> Tree:
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        if plain and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested:
            self._found.append(tensor)
            return ["tensor"]
        if plain and tensor.layout is torch.sparse_coo and (tensor.is_coalesced() or not tensor.requires_grad):
            if tensor.is_coalesced():
                self._found += [tensor.indices(), tensor.values()]
            else:
                self._found += uncoalesced(tensor)
            return ["sparse_coo", list(tensor.shape), tensor.is_coalesced()]
        if plain and tensor.layout in _COMPRESSED:
            by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
            outer = tensor.crow_indices() if by_rows else tensor.ccol_indices()
            inner = tensor.col_indices() if by_rows else tensor.row_indices()
            self._found += [outer, inner, tensor.values()]
            return [str(tensor.layout).removeprefix("torch."), list(tensor.shape)]
        if self._objects is not None:  # nothing of it is known
            self._found.append(tensor)
            return ["tensor"]
        what, cure = f"a tensor of {tensor.layout}", "its values and offsets, or .to_dense()"
        if not plain:
            what, cure = type(tensor).__name__, ".as_subclass(torch.Tensor) of it"
        elif tensor.layout is torch.sparse_coo:
            what, cure = "a sparse tensor that needs a gradient and is not coalesced", ".coalesce() or .to_dense()"
        elif tensor.is_quantized:
            what, cure = "a quantized tensor", ".dequantize()"
        return self._other(tensor, what, f"return {cure}")

    def _other(self, value: Any, what: str, cure: str) -> Tree:
        if self._objects is None:
            raise TypeError(
                f"{what} cannot travel between stages: features may be tensors, numbers, strings and None, in tuples, "
                f"lists, dicts, named tuples and dataclasses; {cure}"
            )
        self._objects.append(value)
        return ["object"]

    def _plain(self, value: Any) -> Tree:
        """Return the tree of a key, or of what a registered class keeps besides its children: no tensors."""
        inner: list[Tensor] = []
        objects: list[Any] | None = None if self._objects is None else []
        tree = _Apart(inner, objects).tree(value)
        if inner:
            return self._other(value, "a key that holds tensors", "use plain values as keys")
        if self._objects is not None:
            self._objects += objects or []
        return tree

    def _name(self, kind: type) -> str:
        name = f"{kind.__module__}:{kind.__qualname__}"
        if self._objects is None and _find(name) is not kind:
            raise TypeError(
                f"{kind.__name__} cannot travel between stages: another process does not find {name}; define it at the "
                "top of a module, or return its tensors in a tuple or a dict"
            )
        if self._objects is not None:
            self._objects.append(kind)
            return ""
        return name


def _value(tree: Tree, tensors: Iterator[Tensor], objects: Iterator[Any]) -> Any:
    kind, *rest = tree

    def children(trees: list[Tree]) -> list[Any]:
        return [_value(child, tensors, objects) for child in trees]

    match kind:
        case "tensor":
            return next(tensors)
        case "plain":
            return rest[0]
        case "integer":
            return int(rest[0])
        case "complex":
            return complex(*rest)
        case "dtype":
            return getattr(torch, rest[0])
        case "device":
            return torch.device(rest[0])
        case "tuple" | "list" | "Size":
            return {"tuple": tuple, "list": list, "Size": torch.Size}[kind](children(rest))
        case "dict":
            return {_value(key, tensors, objects): _value(child, tensors, objects) for key, child in rest}
        case "registered":
            cls = _find(rest[0]) if rest[0] else next(objects)
            node = registered_node(cls)
            assert node is not None
            context = _value(rest[1], tensors, objects)
            return node[1](children(rest[2:]), context)
        case "namedtuple":
            cls = _find(rest[0]) if rest[0] else next(objects)
            assert _is_named_tuple(cls)
            return cls._make(children(rest[1:]))
        case "dataclass":
            cls = _find(rest[0]) if rest[0] else next(objects)
            assert dataclasses.is_dataclass(cls)
            made: Any = object.__new__(cast(type[Any], cls))
            for name, child in zip(rest[1], children(rest[2:]), strict=True):
                object.__setattr__(made, name, child)  # without __init__, and though it may be frozen
            return made
        case "sparse_coo":
            indices, values = next(tensors), next(tensors)
            return torch.sparse_coo_tensor(indices, values, rest[0], is_coalesced=rest[1], check_invariants=False)
        case "object":
            return next(objects)
    layout = getattr(torch, kind)
    outer, inner, values = next(tensors), next(tensors), next(tensors)
    return torch.sparse_compressed_tensor(outer, inner, values, rest[0], layout=layout, check_invariants=False)


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields") and hasattr(kind, "_make")


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return None
    return found
