"""What ``torch.compile`` has made of the module that is partitioned goes for its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_stale.pipeline.block import Block
from lightning_stale.private.of_lightning import compiler
from lightning_stale.private.of_modules import compile_call


def compile_blocks(model: nn.Module, path: str, blocks: Sequence[Block]) -> None:
    """Compile each block as ``model`` or the module at ``path``, or one that holds it, is compiled, if so.

    Args:
        model: the LightningModule.
        path: of the module that is partitioned; empty if that is ``model`` itself.
        blocks: what it is partitioned into.
    """
    names = path.split(".") if path else []
    holders = [model, *(model.get_submodule(".".join(names[: n + 1])) for n in range(len(names)))]
    compilers = [found for holder in holders if (found := compiler(holder)) is not None]
    if compilers:
        for block in blocks:
            compile_call(block.module, compilers[-1])
