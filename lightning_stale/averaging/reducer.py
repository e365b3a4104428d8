"""Sums over a process group of their own, in large pieces and a fixed order, which training does not wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stale.averaging.rounds import Reducer

BUCKET_ELEMENTS = 6 * 2**20  # 24 MiB of float32: large enough for the bandwidth, small enough to overlap
_POLL_S = 0.0002


class ProcessGroupReducer(Reducer):
    """All-reduces in flight on ``group``; on CUDA, on a stream of their own.

    Args:
        group: used by nothing else, so that the order of collectives is that of the rounds on every rank.
        device: where the tensors are.
        check: called again and again while waiting; raises to break off.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, check: Callable[[], None]) -> None:
        self._group, self._check = group, check
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._works: list[Any] = []

    def launch(self, tensors: Sequence[Tensor]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._works = [
                dist.all_reduce(bucket, group=self._group, async_op=True)
                for tensor in tensors
                for bucket in tensor.split(BUCKET_ELEMENTS)  # type: ignore[no-untyped-call]
            ]

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        while not self.done():
            time.sleep(_POLL_S)
            self._check()
        for work in self._works:
            work.wait()  # raises what has gone wrong; on CUDA, orders the streams
        self._works = []
