"""Trace as little of a model as partitioning it needs: the forwards on the way to the named submodules.

What holds none of the names is called as it is, so that it may branch, loop, be compiled, pack sequences, or come from
another library.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from lightning_stale.pipeline.partition.demands import demand, demanded, line_of

_TORCH = str(Path(torch.__file__).parent)


class Trace(NamedTuple):
    """What a module computes, and in which modes the modules were that it was traced through."""

    graph: fx.Graph
    modes: list[tuple[nn.Module, bool]]


def traces(body: nn.Module, names: Sequence[str]) -> tuple[Trace, Trace]:
    """Trace ``body`` in train and in eval mode; arguments with a default have that value.

    Args:
        body: the module.
        names: of the submodules that start a block.
    """
    try:
        return _trace(body, names, True), _trace(body, names, False)
    except Exception as error:  # it may use the result of a submodule in a way that asks what it is
        try:
            return _trace(body, None, True), _trace(body, None, False)
        except Exception:
            raise error from None


def _trace(body: nn.Module, names: Sequence[str] | None, training: bool) -> Trace:
    modes = [(module, module.training) for module in body.modules()]
    try:
        if body.training != training:  # or else as it is: parts of it may be frozen
            body.train(training)
        tracer = _Spine(names)
        graph = tracer.trace(body)
        return Trace(graph, [(module, module.training) for module in [body, *tracer.through]])
    finally:
        for module, mode in modes:
            module.training = mode


class _Spine(fx.Tracer):
    """Follows the forwards of the modules that hold one of ``names``, or (``None``) of all but torch's own."""

    proxy_buffer_attributes = True  # a causal mask is cut to the length of its input

    def __init__(self, names: Sequence[str] | None) -> None:
        super().__init__()
        self._names = names
        self.through: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._names is None:
            leaf = super().is_leaf_module(m, module_qualified_name)
        else:
            leaf = not any(name.startswith(f"{module_qualified_name}.") for name in self._names)
        if not leaf:
            self.through.append(m)
        return leaf

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        wanted = demanded(frame)
        if wanted is None:
            return bool(super().to_bool(obj))
        self.create_proxy("call_function", demand, (obj, wanted, line_of(frame)), {})
        return wanted

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make every argument without a default one of the graph, and let the others have their defaults."""
        positional: list[Any] = [self.root]
        named: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            given = self.create_proxy("placeholder", name, (), {})
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                self.create_proxy("call_function", keep_default, (given, name, "nothing"), {})
                continue
            if parameter.default is not parameter.empty:
                self.create_proxy("call_function", keep_default, (given, name, repr(parameter.default)), {})
                given = parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = given
            else:
                positional.append(given)

        def run(*arguments: Any) -> Any:
            return root_fn(*arguments, **named)

        # fx looks for functions to wrap among the globals of what it traces
        return FunctionType(run.__code__, inspect.unwrap(root_fn).__globals__, None, None, run.__closure__), positional


def keep_default(value: object, name: str, default: str) -> None:
    """Refuse an argument with a default if it is given another value: the trace knows nothing else.

    Raises:
        ValueError: with what to write.
    """
    same = not isinstance(value, torch.Tensor) and (repr(value) == default if default != "nothing" else not value)
    if not same:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(
            f"the model is given {name}={found}, and it was cut for {default}, the default: name the argument without "
            f"a default in forward, or call the model without it, or define configure_stages() in the LightningModule"
        )
