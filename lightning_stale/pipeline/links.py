"""Channels between the stages of neighbouring ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_stale.pipeline.channels import Channel, ReceiveChannel, SendChannel
from lightning_stale.pipeline.staleness import Staleness


def stage_mesh(world_size: int, device: torch.device) -> DeviceMesh:
    """Return the mesh (replica, stage), with one replica; the last stage is on global rank 0."""
    ranks = torch.arange(world_size - 1, -1, -1).view(1, world_size)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("replica", "stage"))


def link_stages(
    mesh: DeviceMesh, staleness: Staleness, device: torch.device, check: Callable[[int, bool], None]
) -> dict[str, Channel]:
    """Return this rank's channels, by the names of the arguments of ``Pipeline``.

    Each direction between two ranks has a process group of its own. All ranks take part in making all groups.

    Args:
        mesh: from :func:`stage_mesh`.
        staleness: of all stages.
        device: where the tensors are.
        check: called with the neighbour's rank while waiting for it, and whether it seems to have ended; raises to
            break off.
    """
    ranks = [int(rank) for rank in mesh.mesh[0].tolist()]
    per_rank = staleness.stages // len(ranks)
    channels: dict[str, Channel] = {}
    for position, (before, after) in enumerate(pairwise(ranks)):
        down, up = dist.new_group([before, after]), dist.new_group([before, after])
        last = (position + 1) * per_rank - 1  # the last stage of `before`
        features, gradients = staleness.p[last], staleness.q[last + 1]
        if dist.get_rank() == before:
            channels["features_out"] = SendChannel(after, down, features, device, partial(check, after))
            channels["gradients_in"] = ReceiveChannel(after, up, gradients, device, partial(check, after))
        if dist.get_rank() == after:
            channels["features_in"] = ReceiveChannel(before, down, features, device, partial(check, before))
            channels["gradients_out"] = SendChannel(before, up, gradients, device, partial(check, before))
    return channels
