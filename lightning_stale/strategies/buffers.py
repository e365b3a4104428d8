"""Module buffers: each worker has its own while training runs, and all have the same at a meeting point."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def agree_on_buffers(model: nn.Module, world_size: int) -> None:
    """Average the running statistics of norm layers over the ranks; give all other buffers the values of rank 0.

    Batch norm's mean and variance are averaged elementwise, as is usual in local SGD and parameter-server training;
    counters, tables and queues cannot be averaged, and get rank 0's values as in DDP.
    """
    if world_size == 1:
        return
    statistics = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in (module.running_mean, module.running_var)
        if isinstance(buffer, Tensor)
    }
    for buffer in model.buffers():
        if id(buffer) in statistics:
            torch.distributed.all_reduce(buffer)
            buffer.div_(world_size)
        elif buffer.numel() > 0:
            torch.distributed.broadcast(buffer, src=0)
