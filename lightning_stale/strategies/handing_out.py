"""The training loader of workers that are granted batches, whoever grants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_stale.data.loader import NextBatch, OnDemandLoader

Data = Literal["auto", "on-demand", "shards"]

WHOLE: dict[str, Any] = {"num_replicas": 1, "rank": 0}
"""What Lightning's sampler is made with: workers that are granted batches all have the whole order of the epoch."""


def check_data(data: str) -> None:
    """Raise ``ValueError`` unless ``data`` is one of :data:`Data`."""
    if data not in ("auto", "on-demand", "shards"):
        raise ValueError(f"data={data!r} is unknown: write 'auto', 'on-demand' or 'shards'")


def granted(loader: object, workers: int, hand_out: Callable[[int], NextBatch]) -> OnDemandLoader:
    """Return a loader of the batches that this worker is granted.

    Args:
        loader: the user's, with Lightning's sampler.
        workers: among how many its batches are shared.
        hand_out: begins to ask for them, given how many the loader fetches ahead; returns what asks for the next.
    """
    own = cast(DataLoader[Any], loader)
    return OnDemandLoader(own, workers, hand_out(own.num_workers * (own.prefetch_factor or 0)))


def refuse(reason: str) -> MisconfigurationException:
    """Return what is raised where batches cannot be handed out as they should, for ``reason``."""
    return MisconfigurationException(f"data='on-demand', but {reason}: write data='shards'")
