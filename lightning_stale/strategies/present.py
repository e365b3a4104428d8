"""The ranks that are present in a run that may lose some, and gain others: torch's default process group is theirs."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lightning_stale.private import of_torch
from lightning_stale.transport.groups import break_off

log = logging.getLogger(__name__)

Members = tuple[tuple[int, int], ...]
"""(rank, generation) of those present, in that order: an index in it is a rank in torch."""

FORMING_S = 10.0
"""How long they may take to find each other: all have just met, and who has died since then is missed soon."""


class Present:
    """Who is present, as the last meeting has said, and the process group of these.

    Until :meth:`begin`, and where all stay, it is the group that Lightning has made, and nothing is done here. Who is
    present (:attr:`members`) is the same on all of them, since each meeting says it; whether the group has come about
    (:meth:`join_group`) may not be: a rank that has seen something fail in it notes so for all (:meth:`leave_group`),
    and after one more meeting all know (:attr:`broken`).

    Attributes:
        members: who is present; empty outside of a run that may lose ranks.
        world_size: how many they are; ``None`` as long as they are those that Lightning has launched.
        index: the rank in torch; ``None`` likewise.
        began_with: how many ranks the run began with; ``None`` outside of one.
    """

    def __init__(self) -> None:
        self.members: Members = ()
        self.world_size: int | None = None
        self.index: int | None = None
        self.began_with: int | None = None
        self._rank = -1
        self._run = ""
        self._timeout = timedelta()
        self._backend = ""
        self._store: Store | None = None  # rank 0's is the server: it is to outlive the group that has made it
        self._group: tuple[Members, int] = ((), 0)  # whose it is, and how many there were before it of the same members
        self._attempt = 0

    @property
    def elastic(self) -> bool:
        """Whether they may change."""
        return self.began_with is not None

    @property
    def members_index(self) -> int:
        """Where this rank is among the :attr:`members`."""
        return [rank for rank, _ in self.members].index(self._rank)

    @property
    def grouped(self) -> bool:
        """Whether this process is in the group of those present."""
        return self._group == (self.members, self._attempt) and dist.is_initialized()

    def adopt(self, launched: int) -> None:
        """Go on with the group that a fit of another Trainer has left, which may have lost ranks.

        Args:
            launched: how many ranks Lightning believes in.
        """
        if dist.is_initialized() and dist.get_world_size() != launched:
            self.world_size, self.index = dist.get_world_size(), dist.get_rank()

    def begin(self, run: str, members: Members, rank: int, began_with: int, timeout: timedelta) -> None:
        """A run begins in which they may change.

        Args:
            run: a name that no other run has, the same on all ranks.
            members: those of the default process group of now; of a rank that joins a running fit, itself.
            rank: this one, as in ``members``.
            began_with: how many ranks the run began with.
            timeout: of a collective, from now on.
        """
        self._run, self._rank, self._timeout = run, rank, timeout
        self.began_with, self.members = began_with, members
        self._group, self._attempt = (members, 0), 0
        if dist.is_initialized():
            self._store, self._backend = of_torch.shared_store(), dist.get_backend()
            _default_group().set_timeout(timeout)

    def end(self, timeout: timedelta) -> None:
        """The run is over: those present stay as they are from now on.

        Args:
            timeout: of a collective, from now on.
        """
        if self.elastic and dist.is_initialized():
            _default_group().set_timeout(timeout)
        self.members, self.began_with = (), None

    def follow(self, members: Members) -> None:
        """Let those present be ``members``, as a meeting has said; the group of others is left.

        Args:
            members: this rank is one of them.
        """
        if members == self.members:
            return
        log.info("ranks present: %s", ", ".join(str(rank) for rank, _ in members))
        self.members, self._attempt = members, 0
        self.world_size = len(members)
        self.index = self.members_index
        self._destroy()

    def join_group(self) -> None:
        """Be in the group of those present, who all call this.

        Raises:
            RuntimeError: of torch, if it does not come about.
        """
        if self.grouped:
            return
        self._destroy()
        assert self._store is not None
        of_torch.form_default_group(
            self._backend,
            self._store,
            self._prefix,
            self.members_index,
            len(self.members),
            timedelta(seconds=FORMING_S),
        )
        _default_group().set_timeout(self._timeout)
        self._group = (self.members, self._attempt)

    def leave_group(self) -> None:
        """Let all know that something has failed in the group, and let nobody wait there for this rank."""
        self._destroy()
        if self._store is not None:
            self._store.add(f"{self._prefix}/broken", 1)  # which answers: whom this rank meets then will see it

    @property
    def broken(self) -> bool:
        """Whether one of those present has left the group; ask after a meeting, and it is the same on all."""
        return self._store is not None and self._store.check([f"{self._prefix}/broken"])

    def try_again(self) -> None:
        """Let the next group of the same members be another one; all of them call this."""
        self._destroy()
        self._attempt += 1

    @property
    def _prefix(self) -> str:
        name = hashlib.sha256(f"{self._run} {self.members}".encode()).hexdigest()[:16]
        return f"lightning_stale/members/{name}/{self._attempt}"

    @staticmethod
    def _destroy() -> None:
        if dist.is_initialized():
            with suppress(RuntimeError):
                break_off(_default_group())  # its connections: an error in flight may hold the group for a while
            dist.destroy_process_group()


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
