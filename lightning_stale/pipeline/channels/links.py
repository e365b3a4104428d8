"""Channels between the stages of neighbouring ranks."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_stale.pipeline.channels.channel import Channel, break_off_all, end
from lightning_stale.pipeline.channels.process import ReceiveChannel, SendChannel
from lightning_stale.pipeline.channels.transfer import GrantedTransfer
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.transport.groups import destroy, new_group

_POLL_S = 0.5


def stage_mesh(world_size: int, device: torch.device) -> DeviceMesh:
    """Return the mesh (replica, stage), with one replica; the last stage is on global rank 0."""
    ranks = torch.arange(world_size - 1, -1, -1).view(1, world_size)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("replica", "stage"))


def destroy_mesh(mesh: DeviceMesh) -> None:
    """Destroy the groups that ``mesh`` has made."""
    for group in mesh.get_all_groups():
        if group is not dist.group.WORLD:
            destroy(group)


class Links:
    """This rank's channels to its neighbours, and the process groups under them.

    Each direction between two ranks has a group over gloo, and where the ranks talk over NCCL another one for tensors.
    All ranks take part in making all groups.

    Args:
        mesh: from :func:`stage_mesh`.
        staleness: of all stages.
        device: where the tensors are.
        check: called with the neighbour's rank while waiting for it, and whether it seems to have ended; raises to
            break off.
        timeout: how long the ranks may take to find each other, and a transfer over NCCL once both sides are ready.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        staleness: Staleness,
        device: torch.device,
        check: Callable[[int, bool], None],
        timeout: timedelta,
    ) -> None:
        self._device, self._check, self._timeout = device, check, timeout
        self._groups: list[dist.ProcessGroup] = []
        self._grants: list[threading.Lock] = []
        self._neighbours: set[int] = set()
        self.channels: dict[str, Channel] = {}
        """By the names of the arguments of ``Pipeline``."""
        ranks = [int(rank) for rank in mesh.mesh[0].tolist()]
        per_rank = staleness.stages // len(ranks)
        for position, (before, after) in enumerate(pairwise(ranks)):
            last = (position + 1) * per_rank - 1  # the last stage of `before`
            self._link("features", before, after, staleness.p[last])
            self._link("gradients", after, before, staleness.q[last + 1])
        atexit.register(self.break_off)  # threads that outlive the interpreter abort it

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Enter once no transfer is under way that occupies the device; none begins before this is left.

        NCCL's operations in different groups must not meet in another order on each device, and a collective may wait
        for a rank that waits for a transfer.
        """
        with ExitStack() as held:
            for lock in self._grants:
                while not lock.acquire(timeout=_POLL_S):
                    self._check_neighbours()
                held.callback(lock.release)
            yield

    def end(self) -> None:
        """End the channels once everything has been sent, and destroy their groups."""
        try:
            end(self.channels.values(), self._check_neighbours)
        finally:
            self.break_off()

    def break_off(self) -> None:
        """End the channels at once, and destroy their groups."""
        atexit.unregister(self.break_off)
        break_off_all(self.channels.values())
        self.channels.clear()
        while self._groups:
            destroy(self._groups.pop())

    def _check_neighbours(self) -> None:
        for rank in self._neighbours:
            self._check(rank, False)

    def _link(self, what: str, source: int, target: int, length: int) -> None:
        control = self._new_group(source, target, "gloo")
        data = self._new_group(source, target, "nccl") if self._over_nccl() else None
        rank = dist.get_rank()
        if rank == source:
            self._neighbours.add(target)
            transfer = None if data is None else GrantedTransfer(target, self._device, data, control)
            self.channels[f"{what}_out"] = SendChannel(
                target, control, length, self._device, partial(self._check, target), transfer
            )
        if rank == target:
            self._neighbours.add(source)
            transfer = None if data is None else GrantedTransfer(source, self._device, data, control, self._new_lock())
            self.channels[f"{what}_in"] = ReceiveChannel(
                source, control, length, self._device, partial(self._check, source), transfer
            )

    def _over_nccl(self) -> bool:
        return self._device.type == "cuda" and "nccl" in dist.get_backend()

    def _new_lock(self) -> threading.Lock:
        self._grants.append(threading.Lock())
        return self._grants[-1]

    def _new_group(self, source: int, target: int, backend: str) -> dist.ProcessGroup:
        group = new_group([source, target], self._timeout, backend)
        if dist.get_rank() in (source, target):
            self._groups.append(group)
        return group
