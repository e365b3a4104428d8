"""A process that joins a fit that runs: until it takes part, it is in a process group of its own."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from lightning_stale.launchers.replacements import JOIN
from lightning_stale.private import of_torch
from lightning_stale.transport import invitation
from lightning_stale.transport.invitation import Invitation

_NEWCOMERS = "lightning_stale/newcomers"


class Newcomer:
    """What this process does differently from one that was there when the run began.

    So that all that Lightning does to set up (barriers, names of folders, weights of rank 0) stays in this process,
    which is rank 0 of a torch group of one, and never rank 0 to Lightning.

    Args:
        rank: whose place it takes; -1: it is a further one.

    Attributes:
        rank: once the server has let it in, the one that it has.
        generation: then, how many have been that rank.
        sets_up: whether it does not take part yet.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.generation, self.sets_up = rank, 0, True

    @property
    def rank_here(self) -> int:
        """The rank by which everybody here knows that he is not rank 0."""
        return self.rank if self.rank > 0 else 1

    def form_group(self, address: str, port: int, backend: str, timeout: timedelta) -> None:
        """Have the run's store, and a group of this process alone.

        Raises:
            NotInvitedError: if the run is over.
        """
        if torch.distributed.is_initialized():
            return
        store = invitation.connect(address, port)
        number = store.add(_NEWCOMERS, 1)
        of_torch.form_default_group(backend, store, f"{_NEWCOMERS}/{number}", 0, 1, timeout)

    def find_run(self) -> str:
        """Return the name of the run.

        Raises:
            NotInvitedError: if it has no fit to join (any more).
        """
        return Invitation.read(of_torch.shared_store()).run


_newcomer: Newcomer | None = None


def newcomer_of_this_process() -> Newcomer | None:
    """Return what this process is as long as it joins a fit, which is the first of its script."""
    global _newcomer
    rank = os.environ.pop(JOIN, None)  # processes that it starts, to load data, say, join nothing
    if rank is not None:
        _newcomer = Newcomer(int(rank))
    return _newcomer


def has_joined() -> None:
    """The fit is over: from now on this process is one like all."""
    global _newcomer
    _newcomer = None
