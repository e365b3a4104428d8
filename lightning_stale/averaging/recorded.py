"""When the sums of a rank's rounds had arrived: recorded, and given again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgpack
from torch import Tensor

from lightning_stale.averaging.rounds import Reducer


class RecordedReducer(Reducer):
    """Another reducer, and a file with how often each sum was asked for in vain before it was there, or waited for.

    With ``interval="auto"`` that says how many steps each round had, and all else about a rank follows from it.

    Args:
        reducer: sums.
        path: of the file, which must not exist: a stream of msgpack with a number for each sum.
    """

    def __init__(self, reducer: Reducer, path: Path) -> None:
        self._reducer = reducer
        self._file = path.open("xb", buffering=0)
        self._asked = 0

    def launch(self, tensors: Sequence[Tensor]) -> None:
        self._asked = 0
        self._reducer.launch(tensors)

    def done(self) -> bool:
        done = self._reducer.done()
        self._asked += not done
        return done

    def wait(self) -> None:
        self._file.write(msgpack.packb(self._asked))
        self._reducer.wait()


class ReplayedReducer(Reducer):
    """Another reducer, whose sums are there when those of a record were, and are waited for if they are not yet.

    Args:
        reducer: sums.
        path: of a file that :class:`RecordedReducer` has written.
    """

    def __init__(self, reducer: Reducer, path: Path) -> None:
        self._reducer = reducer
        self._in_vain = iter(list(msgpack.Unpacker(path.open("rb"))))
        self._left = 0

    def launch(self, tensors: Sequence[Tensor]) -> None:
        self._left = next(self._in_vain, 0)
        self._reducer.launch(tensors)

    def done(self) -> bool:
        self._left -= 1
        return self._left < 0

    def wait(self) -> None:
        self._reducer.wait()
