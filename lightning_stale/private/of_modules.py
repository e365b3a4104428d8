"""Reaches into private parts of ``torch.nn.Module`` (read in torch 2.13); a test fails when one of them moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return names and modules of all children; ``named_children()`` leaves out one that comes a second time."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def held_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that ``module`` itself has a place for, those of None too."""
    return [*module._parameters, *module._buffers]


def holder_of(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    """Return the dict in which ``module`` itself holds its parameter or buffer ``name``."""
    holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    return holder


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which ``module`` itself holds its buffers."""
    return module._buffers


@contextmanager
def persistence_kept(module: nn.Module) -> Iterator[None]:
    """Leave each buffer of ``module`` in the ``state_dict()``, or out of it, whatever is done to it meanwhile."""
    before = [(part, set(part._non_persistent_buffers_set)) for part in module.modules()]
    try:
        yield
    finally:
        for part, names in before:
            part._non_persistent_buffers_set = names


def keeps_statistics(module: nn.Module) -> bool:
    """Whether ``module`` changes its buffers when it trains, as batch norm and instance norm do."""
    return isinstance(module, _NormBase)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or ``module`` itself."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def without_wrappers(path: str) -> str:
    """Return the path of a submodule without the names of what ``torch.compile`` has put around modules."""
    return path.replace("_orig_mod.", "")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` has been used on it."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def compile_call(module: nn.Module, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let a call of ``module``, hooks included, be what ``compiler`` makes of it, as ``module.compile()`` does."""

    def call(*args: Any) -> Any:  # torch.compile skips a forward of torch.nn that is the first frame
        return module._call_impl(*args)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = compiler(call)
