"""No two blocks share a parameter: each has its own optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_stale.pipeline.block import Block


def check_disjoint(blocks: Sequence[Block], outside: Iterable[tuple[str, nn.Parameter]] = ()) -> None:
    """Refuse a parameter that two blocks share, or that a block shares with what lies outside of all blocks.

    Args:
        blocks: the blocks.
        outside: (name, parameter) of what the model holds outside of the module that is partitioned.

    Raises:
        ValueError: names it.
    """
    owner: dict[int, tuple[int, str]] = {}
    for k, block in enumerate(blocks):
        for name, parameter in block.module.named_parameters():
            first, other = owner.setdefault(id(parameter), (k, name))
            if first != k:
                raise ValueError(
                    f"blocks {first} and {k} share a parameter ({other!r} and {name!r}), and each block has its own "
                    f"optimizer: untie them (model.{name} = nn.Parameter(model.{other}.detach().clone()); for a "
                    "Hugging Face model tie_word_embeddings=False in its config), or choose a split that keeps both in "
                    "one block"
                )
    for name, parameter in outside:
        if id(parameter) in owner:
            k, other = owner[id(parameter)]
            raise ValueError(
                f"{name!r} is {other!r} of block {k}, and what lies outside of the blocks is the last stage's: make "
                "it part of the module that is cut, in the same block, or do not share it"
            )
