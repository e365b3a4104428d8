"""Why torch.fx cannot follow a forward, and what to do about it."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

import torch
from torch import fx, nn

_TORCH = str(Path(torch.__file__).parent)
_FX = str(Path(torch.fx.__file__).parent)
_OWN = str(Path(__file__).parent)


def explain(error: BaseException, body: nn.Module) -> tuple[str, str]:
    """Return why ``body`` cannot be traced, with the line of code, and what to do."""
    if type(body).forward is nn.Module.forward:
        return (
            f"it is a {type(body).__name__}, which has no forward of its own",
            "name a module whose forward calls the submodules, DSPStrategy(module=...)",
        )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_FX, _OWN, "<"))]
    frames = [f for f in frames if not f.filename.startswith(_TORCH)] or frames
    line = frames[-1].line or "" if frames else ""
    where = f", in {frames[-1].filename}:{frames[-1].lineno} ({line})" if frames else ""
    of_library = next((kind.__module__.split(".")[0] for kind in type(body).__mro__), "")
    if of_library == "transformers":
        return (
            f"its forward makes arguments and masks as torch.fx cannot follow it ({_brief(error)}){where}",
            "define configure_stages() in the LightningModule, which returns the blocks: docs/dsp.md has it for GPT-2",
        )
    if of_library == "torch":
        cure = "call its layers one after the other in a module of your own"
    elif _various(body) and not isinstance(error, fx.proxy.TraceError):
        cure = "name its arguments in forward"
    else:
        cure = "put that line into a submodule of its own, which is not followed as long as it holds none of the names"
    return _cause(error, line, body) + where, cure


def _cause(error: BaseException, line: str, body: nn.Module) -> str:
    """Return what the forward does that torch.fx cannot follow."""
    text = str(error)
    if "inputs to control flow" in text:
        return "its forward branches on a value"
    if "cannot be iterated" in text:
        return "its forward loops over a value, or unpacks it by *"
    if "cannot be interpreted as an integer" in text:
        return "its forward loops as often as a value says"
    if "'len' is not supported" in text:
        return "its forward calls len() of a value, for which x.size(0) would do"
    if "pack" in line and "sequence" in line:
        return "its forward packs sequences, whose lengths are values"
    if "dynamo-optimized" in text:
        return "its forward calls what torch.compile has made"
    if _various(body):
        return f"its forward takes {', '.join(_various(body))}, and only what has a name is known ({_brief(error)})"
    return f"its forward does what torch.fx cannot follow ({_brief(error)})"


def _various(body: nn.Module) -> list[str]:
    return [
        str(parameter)
        for parameter in inspect.signature(type(body).forward).parameters.values()
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
