"""The entries of our own in a Lightning checkpoint: what they are called, and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TypedDict

from typing_extensions import NotRequired

EntryName = Literal["lightning_stale", "lightning_stale_hpsgd"]
"""Names are in files: they stay."""


class ServerEntry(TypedDict):
    """``"lightning_stale"``: what the parameter server goes on from, beside weights and optimizers."""

    paradigm: str
    """The name of its class; the state of another one is left out."""
    state: dict[str, Any]
    """``Paradigm.state_dict()``: the clocks."""
    updates: int
    world_size: int
    """Counts of another number of workers are left out."""
    apply: dict[str, Any]
    """The apply rule, and what it keeps between pushes."""
    data: NotRequired[dict[str, Any]]
    """Amid an epoch whose batches are handed out: which of them are trained."""
    changes: NotRequired[dict[str, int]]
    """How many workers have joined and were lost, and how many leases were taken back from these."""
    phases: list[dict[str, Any]]
    workers: list[dict[str, Any]]


class AveragingEntry(TypedDict):
    """``"lightning_stale_hpsgd"``: what the global weights are updated with."""

    outer: dict[str, Any] | None
    """``state_dict()`` of the outer optimizer, over the parameters in the order of the inner ones; None without one."""
    data: NotRequired[dict[str, Any]]
    """Amid an epoch whose batches are handed out: of which the changes are in the global weights."""


def write(checkpoint: MutableMapping[str, Any], name: EntryName, make: Callable[[], Mapping[str, Any] | None]) -> None:
    """Add what ``make`` returns to ``checkpoint``, if that is something, and it is of a run and not of weights only."""
    if "optimizer_states" in checkpoint:
        entry = make()
        if entry is not None:
            checkpoint[name] = entry


def read(checkpoint: Mapping[str, Any], name: EntryName) -> Any:
    """Return the entry, or ``None``: the checkpoint is of a plain Trainer's, or of another strategy."""
    return checkpoint.get(name)
