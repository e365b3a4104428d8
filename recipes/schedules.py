"""Learning rates over the epochs."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warm_up_and_drop(
    optimizer: Optimizer, *, milestones: Sequence[int], gamma: float = 0.1, warm_up: int = 0
) -> LambdaLR:
    """Return a schedule that grows linearly over ``warm_up`` epochs, and is multiplied by ``gamma`` at milestones.

    Example::

        >>> import torch
        >>> from recipes.schedules import warm_up_and_drop
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = warm_up_and_drop(optimizer, milestones=[3, 4], gamma=0.1, warm_up=2)
        >>> [round(schedule.lr_lambdas[0](epoch), 3) for epoch in range(5)]
        [0.5, 1.0, 1.0, 0.1, 0.01]
    """

    def factor(epoch: int) -> float:
        grown = min(1.0, (epoch + 1) / warm_up) if warm_up else 1.0
        return grown * gamma ** sum(epoch >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)
