"""What ``torch.compile`` has made of the module that is cut goes for its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_stale.pipeline.stage import Block
from lightning_stale.private import of_lightning, of_torch


def compile_blocks(model: nn.Module, path: str, blocks: Sequence[Block]) -> None:
    """Compile each block as ``model`` or the module at ``path``, or one that holds it, is compiled, if so.

    Args:
        model: the LightningModule.
        path: of the module that was cut; empty if that is ``model`` itself.
        blocks: what it was cut into.
    """
    parts = path.split(".") if path else []
    holders = [model, *(model.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts)))]
    compilers = [compiler for holder in holders if (compiler := of_lightning.compiler(holder)) is not None]
    if not compilers:
        return
    for block in blocks:
        of_torch.compile_call(block.module, compilers[-1])
