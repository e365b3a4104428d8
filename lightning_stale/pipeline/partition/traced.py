"""Blocks of any module that torch.fx can follow, at the names of submodules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.pipeline.partition.tracing import traces
from lightning_stale.pipeline.partition.untraceable import explain
from lightning_stale.private.of_modules import is_compiled, persistence_kept


def partition_traced(body: nn.Module, names: Sequence[str], label: str) -> list[nn.Module]:
    """Partition any module that can be traced (``torch.fx``) where the submodules ``names`` start.

    Values that a later block needs, such as a skip connection, are passed on by the blocks between.

    Args:
        body: the module.
        names: of the submodules that start the second block and those after it, in the order of ``forward``.
        label: what errors call ``body``.

    Returns:
        One module per block, over the parameters of ``body``; all but the last return a tuple of the next one's inputs.

    Raises:
        PartitionError: if a name is not a submodule, the model cannot be traced, or the names are out of order.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from lightning_stale.pipeline.partition.traced import partition_traced
        >>> class Skips(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.two(self.one(x))
        >>> body, x = Skips(), torch.ones(2, 3)
        >>> first, second = partition_traced(body, ["two"], "model")
        >>> torch.equal(second(*first(x)), body(x))
        True
    """
    modules = dict(body.named_modules())
    for name in names:
        _check_not_within_compiled(body, name, label)
        if name not in modules:
            raise PartitionError(
                f"split={list(names)}: {name!r} is not a submodule of {label}; it has "
                f"{', '.join(repr(path) for path, _ in body.named_children())}"
            )
    try:
        training, evaluating = traces(body, names)
    except Exception as error:
        cause, cure = explain(error, body)
        raise PartitionError(
            f"split={list(names)}: {label} ({type(body).__name__}) cannot be traced by torch.fx: {cause}. To have it "
            f"cut, {cure}; or write it as an nn.Sequential, cut another module (DSPStrategy(module=...)), or define "
            "configure_stages() in the LightningModule"
        ) from error
    blocks = _blocks(body, training.graph, names, label)
    if str(training.graph) == str(evaluating.graph):
        return blocks
    as_evaluated = _blocks(body, evaluating.graph, names, label)
    return [_TwoModes(training.modes, evaluating.modes, *both) for both in zip(blocks, as_evaluated, strict=True)]


def _check_not_within_compiled(body: nn.Module, name: str, label: str) -> None:
    module: Any = body
    path = ""
    for child in name.split("."):
        if path and is_compiled(module):
            raise PartitionError(
                f"split: {name!r} lies within {path!r} of {label}, which is compiled as one: let the block start at "
                f"{path!r}, or compile the submodules of {path!r} instead"
            )
        module, path = getattr(module, child, None), f"{path}.{child}".lstrip(".")
        if not isinstance(module, nn.Module):
            return


class _TwoModes(nn.Module):
    """A block whose forward asks for ``self.training``, which a trace answers once and for all."""

    def __init__(
        self,
        training: list[tuple[nn.Module, bool]],
        evaluating: list[tuple[nn.Module, bool]],
        as_trained: nn.Module,
        as_evaluated: nn.Module,
    ) -> None:
        super().__init__()
        self._modes = (training, evaluating)  # no submodules
        self.as_trained, self.as_evaluated = as_trained, as_evaluated

    def forward(self, *features: Any) -> Any:
        for modes, block in zip(self._modes, (self.as_trained, self.as_evaluated), strict=True):
            if all(module.training == mode for module, mode in modes):
                return block(*features)
        other = next(
            module for module, mode in self._modes[not self._modes[0][0][0].training] if module.training != mode
        )
        raise RuntimeError(
            f"{type(other).__name__} is in {'train' if other.training else 'eval'} mode, which it was not when the "
            "model was cut, and the forward around it asks for self.training: put it there before fit, or define "
            "configure_stages() in the LightningModule"
        )


def _blocks(body: nn.Module, graph: fx.Graph, names: Sequence[str], label: str) -> list[nn.Module]:
    """Return the blocks of one graph."""
    found, block_of, block = [], {}, 0
    for node in graph.nodes:
        if block < len(names) and any(_is_within(path, names[block]) for path in _module_paths(node)):
            found.append(names[block])
            block += 1
        block_of[node] = block
    if found != list(names):
        missing = [name for name in names if name not in found]
        raise PartitionError(
            f"split={list(names)}: {missing[0]!r} is not called after the ones before it in {label}; write the names "
            "in the order in which forward calls them"
        )
    return [_block_graph(body, graph, block_of, block) for block in range(len(names) + 1)]


def _block_graph(body: nn.Module, graph: fx.Graph, block_of: dict[fx.Node, int], block: int) -> fx.GraphModule:
    """Return the nodes of one block as a module; it keeps the names of the submodules of ``body``."""
    result = fx.Graph()
    copies = {node: result.placeholder(node.name) for node in _live(graph, block_of, block)}
    for node in graph.nodes:
        used_here = any(block_of[user] == block for user in node.users)
        if used_here if node.op == "get_attr" else block_of[node] == block and node.op not in ("placeholder", "output"):
            copies[node] = result.node_copy(node, lambda used: copies[used])
    output = next(node for node in graph.nodes if node.op == "output")
    if block == block_of[output]:
        result.output(fx.map_arg(output.args[0], lambda used: copies[used]))
    else:
        result.output(tuple(copies[node] for node in _live(graph, block_of, block + 1)))
    with persistence_kept(body):  # a buffer that is read from outside of its module would be in the state_dict
        return fx.GraphModule(body, result, class_name=f"{type(body).__name__}Block{block}")


def _live(graph: fx.Graph, block_of: dict[fx.Node, int], block: int) -> list[fx.Node]:
    """Return the values that ``block`` is given: the inputs, or what it or a later block still needs.

    Parameters and buffers are not among them: a block that uses one holds it.
    """
    if block == 0:
        return [node for node in graph.nodes if node.op == "placeholder"]

    def made_before(node: fx.Node) -> bool:
        return node.op == "placeholder" or (node.op != "get_attr" and block_of[node] < block)

    return [node for node in graph.nodes if made_before(node) and any(block_of[user] >= block for user in node.users)]


def _module_paths(node: fx.Node) -> list[str]:
    """Return the paths of the submodules that ``node`` belongs to."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return [path for path, _ in stack.values()] + ([str(node.target)] if node.op == "call_module" else [])


def _is_within(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")
