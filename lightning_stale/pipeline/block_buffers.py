"""What a forward does to a block's buffers, undone where the block will run once more for the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_stale.private.of_modules import buffers_of, keeps_statistics
from lightning_stale.private.of_torch import is_view, versions_of

_Modes = tuple[tuple[bool, bool], ...]


@dataclass
class _Held:
    module: nn.Module
    name: str
    buffer: Tensor
    versions: list[int]
    copy: Tensor | None

    def is_untouched(self) -> bool:
        return buffers_of(self.module).get(self.name) is self.buffer and versions_of([self.buffer]) == self.versions


class BlockBuffers:
    """Puts the buffers of a block back after a forward.

    Which modules change theirs is found out by comparing values, once for each combination of train and eval modes: a
    comparison waits for the GPU. After that theirs are put back in any case, and the others' versions are looked at.
    Batch norm is known to, also where the first batch has skipped it (LayerDrop).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._changing: dict[_Modes, set[nn.Module]] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo what happens to the buffers.

        Raises:
            RuntimeError: if a module changes its buffers that has not done so in the first batch.
        """
        modules = list(self._module.modules())
        modes = tuple((module.training, bool(getattr(module, "track_running_stats", True))) for module in modules)
        changing = self._changing.get(modes)
        known = {module for module in modules if module.training and keeps_statistics(module)}
        held = [
            _Held(
                module, name, buffer, versions_of([buffer]), self._copy(buffer, changing is None or module in changing)
            )
            for module in modules
            for name, buffer in buffers_of(module).items()
            if buffer is not None
        ]
        yield
        if changing is None:
            self._changing[modes] = known | {one.module for one in held if not _is_the_same(one)}
        for one in held:
            if one.copy is not None and one.module in self._changing[modes]:
                _put_back(one.buffer, one.copy)
                buffers_of(one.module)[one.name] = one.buffer
            elif not one.is_untouched():
                raise RuntimeError(
                    f"{type(one.module).__name__} changed its buffer {one.name!r}, which it did not do for the first "
                    "batch: write DSPStrategy(recompute=False)"
                )

    @staticmethod
    def _copy(buffer: Tensor, wanted: bool) -> Tensor | None:
        return buffer.detach().clone() if wanted and buffer.layout is torch.strided else None


def _is_the_same(held: _Held) -> bool:
    if not held.is_untouched():
        return False
    return held.copy is None or torch.equal(held.buffer, held.copy)  # batch norm leaves the version alone


@torch.no_grad()
def _put_back(buffer: Tensor, values: Tensor) -> None:
    if buffer.grad_fn is not None and not is_view(buffer):
        buffer.detach_()  # changed by a graph that will not go backward
    buffer.copy_(values)
