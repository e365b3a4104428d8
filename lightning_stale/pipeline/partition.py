"""Find the part of a model that is worth cutting, and cut it into blocks that run one after the other."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from lightning_stale.pipeline.strides import copied
from lightning_stale.pipeline.tracing import explain, traces
from lightning_stale.pipeline.values import map_tensors, tensors


class CannotCutError(ValueError):
    """A model that cannot be cut as asked."""


def count_parameters(module: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or ``module`` itself."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` has been used on it."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def find_body(model: nn.Module, name: str | None, sequential: bool) -> str:
    """Return the name of the module to cut.

    Args:
        model: the LightningModule.
        name: what the user has asked for, e.g. ``"model.body"``.
        sequential: without a name, choose the ``nn.Sequential`` with most parameters; or else the child with most.

    Raises:
        CannotCutError: if there is none, with the alternatives.
    """
    modules = {path: unwrap(module) for path, module in model.named_modules() if path}
    if name is not None:
        if name not in modules:
            near = ", ".join(repr(path) for path in list(modules)[:8])
            raise CannotCutError(f"module={name!r} is not a module of {type(model).__name__}: it has {near}, ...")
        return name
    kind: Any = nn.Sequential if sequential else nn.Module
    candidates = [path for path, module in modules.items() if isinstance(module, kind)]
    if not sequential:
        candidates = [path for path in candidates if "." not in path]
    if not candidates:
        raise CannotCutError(
            f"{type(model).__name__} has no nn.Sequential to cut: write DSPStrategy(split=['layer2', 'layer3']) with "
            "the names of the submodules that start a block, DSPStrategy(module='...') with the name of the one to "
            "cut, or define configure_stages() in the LightningModule"
        )
    best: str = max(candidates, key=lambda path: count_parameters(modules[path]))
    return best


def resolve(model: nn.Module, name: str | None, names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the module to cut, and ``names`` relative to it.

    Args:
        model: the LightningModule.
        name: what the user has asked for; by default :func:`find_body` chooses.
        names: of the submodules that start a block, from the root of ``model`` or relative to the module to cut.
    """
    names = [start.replace("_orig_mod.", "") for start in names]
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


def cut_points(costs: Sequence[float], stages: int) -> list[int]:
    """Return where each further block starts, so that the most expensive block costs least.

    Args:
        costs: the cost of each layer, in any unit.
        stages: the number of blocks.

    Raises:
        CannotCutError: if there are fewer layers than stages.

    Example::

        >>> from lightning_stale.pipeline.partition import cut_points
        >>> cut_points([4, 1, 1, 1, 1, 4], stages=3)
        [1, 5]
    """
    layers = len(costs)
    if layers < stages:
        raise CannotCutError(
            f"{layers} layers cannot be cut into {stages} blocks: write stages={layers} or less, or cut a module with "
            "more layers (DSPStrategy(module=...))"
        )
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: the cost of the most expensive of k blocks that hold the first i layers, and where the last starts
    best = [[(total[i], 0) for i in range(layers + 1)]]
    for k in range(1, stages):
        row = [(float("inf"), 0)] * (k + 1)
        for i in range(k + 1, layers + 1):
            row.append(min((max(best[k - 1][j][0], total[i] - total[j]), j) for j in range(k, i)))
        best.append(row)
    starts, end = [], layers
    for k in range(stages - 1, 0, -1):
        end = best[k][end][1]
        starts.append(end)
    return starts[::-1]


def check_cut_points(split: Sequence[int], layers: int, stages: int) -> list[int]:
    """Return ``split`` if it says where ``stages - 1`` further blocks start.

    Raises:
        CannotCutError: with what to write.
    """
    starts = list(split)
    example = [round(layers * k / stages) for k in range(1, stages)]
    if len(starts) != stages - 1:
        raise CannotCutError(
            f"split={starts} makes {len(starts) + 1} blocks for {stages} stages: write {stages - 1} integers, e.g. "
            f"split={example}"
        )
    if any(not 0 < start < layers for start in starts) or sorted(set(starts)) != starts:
        raise CannotCutError(
            f"split={starts}: write increasing integers between 1 and {layers - 1}, where each further block starts "
            f"among the {layers} children, e.g. split={example}"
        )
    return starts


def cut_sequential(body: nn.Sequential, starts: Sequence[int]) -> list[nn.Module]:
    """Return one ``nn.Sequential`` per block, over the same children."""
    children = list(body._modules.items())  # named_children() leaves out a module that comes a second time
    bounds = [0, *starts, len(children)]
    return [nn.Sequential(OrderedDict(children[a:b])) for a, b in pairwise(bounds)]


def measure_layers(
    body: nn.Sequential,
    example: Any,
    repetitions: int = 5,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Return the seconds of forward and backward of each child, the least of ``repetitions``; nothing is changed.

    Args:
        body: its children run one after the other.
        example: the input of the first.
        repetitions: how often.
        context: entered around each forward (autocast, say).
    """
    buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
    gradients = [parameter.grad for parameter in body.parameters()]
    for parameter in body.parameters():
        parameter.grad = None  # or else what is there would be added to
    times = [float("inf")] * len(body)
    with torch.random.fork_rng():
        for _ in range(repetitions):
            x = example
            for i, layer in enumerate(body):
                x = map_tensors(_leaf, x)
                given = map_tensors(copied, x)  # an in-place layer must not change a leaf, or what comes again
                started = time.perf_counter()
                with context():
                    y = layer(given)
                outputs = [tensor for tensor in tensors(y) if tensor.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[i] = min(times[i], time.perf_counter() - started)
                x = y
    for parameter, gradient in zip(body.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for name, buffer in body.named_buffers():
            buffer.copy_(buffers[name])
    return times


def cut_traced(body: nn.Module, names: Sequence[str], label: str) -> list[nn.Module]:
    """Cut any module that can be traced (``torch.fx``) where the submodules ``names`` start.

    Values that a later block needs, such as a skip connection across a cut, are passed on by the blocks between.

    Raises:
        CannotCutError: if a name is not a submodule, the model cannot be traced, or the names are out of order.
    """
    modules = dict(body.named_modules())
    for name in names:
        _check_not_within_compiled(body, name, label)
        if name not in modules:
            raise CannotCutError(
                f"split={list(names)}: {name!r} is not a submodule of {label}; it has "
                f"{', '.join(repr(path) for path, _ in body.named_children())}"
            )
    try:
        training, evaluating = traces(body, names)
    except Exception as error:
        cause, cure = explain(error, body)
        raise CannotCutError(
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
    for part in name.split("."):
        if path and is_compiled(module):
            raise CannotCutError(
                f"split: {name!r} lies within {path!r} of {label}, which is compiled as one: let the block start at "
                f"{path!r}, or compile the submodules of {path!r} instead"
            )
        module, path = getattr(module, part, None), f"{path}.{part}".lstrip(".")
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
        raise CannotCutError(
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
    kept = [(module, set(module._non_persistent_buffers_set)) for module in body.modules()]
    made = fx.GraphModule(body, result, class_name=f"{type(body).__name__}Block{block}")
    for module, names in kept:  # a buffer that is read from outside of its module would now be in the state_dict
        module._non_persistent_buffers_set = names
    return made


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


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
