"""Collectives of ranks that are killed in them: real processes, and a control that says who is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_stale.strategies import present as module
from lightning_stale.strategies.collectives import Collectives
from lightning_stale.strategies.other_ranks import OtherRanks
from lightning_stale.strategies.present import Members, Present
from tests.integration.harness import signal_test, workers

PATIENCE_S = 3.0


class Meetings:
    """In the test: lets workers go on once all who are left have come, and says who these are."""

    def __init__(self, world_size: int) -> None:
        self._listener = Listener(("127.0.0.1", 0))
        self.address = self._listener.address
        self._world_size = world_size
        self._ranks: dict[Connection, int] = {}
        self.give_up = set[int]()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while len(self._ranks) < self._world_size:
            connection = self._listener.accept()
            self._ranks[connection] = connection.recv()
        waiting: set[Connection] = set()
        while self._ranks:
            for connection in wait(list(self._ranks), timeout=0.05):
                assert isinstance(connection, Connection)
                try:
                    if connection.recv() == "meet":
                        waiting.add(connection)
                    else:
                        connection.send("pong")
                except (EOFError, ConnectionError):
                    self._ranks.pop(connection)
                    waiting.discard(connection)
            for connection, rank in list(self._ranks.items()):
                if rank in self.give_up:
                    del self._ranks[connection]
            if waiting >= self._ranks.keys():
                members = tuple(sorted((rank, 1) for rank in self._ranks.values()))
                for connection in waiting:
                    connection.send(members)
                waiting.clear()


class Control:
    """A worker's side of it."""

    failure = None

    def __init__(self, address: Any, rank: int) -> None:
        self._connection = Client(address)
        self._connection.send(rank)
        self.members: Members = ()

    def meet(self, place: str, detail: str = "", region: str = "") -> None:
        self._connection.send("meet")
        self.members = self._connection.recv()

    def check(self, fresh: bool = False) -> None:
        self._connection.send("ping")
        self._connection.recv()

    def blame(self) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


class Rank:
    """A worker, as far as its collectives go; rank 0 outlives the others, as the store is in its process."""

    def __init__(self, rank: int, world_size: int, address: Any) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        self.rank, self.present, self.control = rank, Present(), Control(address, rank)
        self.present.begin(
            "a run", tuple((r, 1) for r in range(world_size)), rank, world_size, timedelta(seconds=PATIENCE_S)
        )
        trainer: Any = SimpleNamespace(global_step=0)
        others = OtherRanks(lambda: trainer)
        others.join(self.control)
        follow = lambda: self.present.follow(self.control.members)  # noqa: E731
        self.collectives = Collectives(others, lambda: True, nullcontext, self.present, follow)

    def sum(self, value: int, before: Any = None, after: Any = None) -> int:
        def call() -> int:
            tensor = torch.tensor([value] * 1000)
            if before is not None:
                before()
            dist.all_reduce(tensor)
            if after is not None:
                after()
            return int(tensor[0])

        return self.collectives.run("sum", call)

    def end(self) -> None:
        self.control.meet("the end")


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def many_sums(rank: int, world_size: int, address: Any, count: int, folder: str) -> list[tuple[int, Any]]:
    me, sums = Rank(rank, world_size, address), []
    for step in range(count):
        sums.append((me.sum(10**rank), me.present.members))
        if step == 10:
            signal_test(folder, f"ready-{rank}")
    me.end()
    return sums


@contextmanager
def started(function: Any, world_size: int, folder: Path, *args: Any) -> Iterator[Any]:
    meetings = Meetings(world_size)
    with workers(function, world_size, folder, world_size, meetings.address, *args) as group:
        yield group, meetings


def results(group: Any, lost: set[int], timeout: float = 60.0) -> list[Any]:
    ended = group.join(timeout)
    failed = [worker for worker in ended if worker.rank not in lost and (worker.exitcode != 0 or worker.error)]
    assert not failed, "\n".join(f"rank {w.rank} (exit code {w.exitcode}):\n{w.error}" for w in failed)
    return [worker.result for worker in ended if worker.rank not in lost]


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_are_killed_at_any_moment_leave_the_same_results_on_all_others(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    lost = set(chance.sample([1, 2, 3], k=1 + seed % 2))
    with started(many_sums, 4, tmp_path, 400, str(tmp_path)) as (group, _):
        for rank in range(4):
            group.wait_for(f"ready-{rank}")
        for rank in lost:
            time.sleep(chance.uniform(0.0, 0.2))
            os.kill(group.pid(rank), signal.SIGKILL)
        first, *others = results(group, lost)
    assert all(sums == first for sums in others)
    assert all(total == sum(10**rank for rank, _ in members) for total, members in first), (
        "each sum is of those present"
    )
    assert [rank for rank, _ in first[-1][1]] == sorted(set(range(4)) - lost)


def dies_in_a_sum(rank: int, world_size: int, address: Any, when: str) -> tuple[int, int, int | None, int]:
    me = Rank(rank, world_size, address)
    assert me.present.index is None, "nothing has changed"
    me.sum(1)
    total = me.sum(10**rank, **{when: kill_me} if rank == 1 else {})
    me.end()
    return total, dist.get_world_size(), me.present.index, dist.get_rank()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sum_in_which_a_rank_dies_is_that_of_the_others(when: str, tmp_path: Path) -> None:
    with started(dies_in_a_sum, 3, tmp_path, when) as (group, _):
        assert results(group, {1}) == [(101, 2, 0, 0), (101, 2, 1, 1)]


def dies_while_forming(rank: int, world_size: int, address: Any) -> int:
    me = Rank(rank, world_size, address)
    if rank == 1:
        kill_me()
    if rank == 2:
        form, me.present.join_group = me.present.join_group, kill_me  # type: ignore[method-assign]
        me.collectives.barrier(lambda: None)
        assert form is not None
    module.FORMING_S = 1.0
    total = me.sum(10**rank)
    me.end()
    return total


def test_a_rank_that_dies_while_a_group_forms_is_left_out_of_the_next(tmp_path: Path) -> None:
    with started(dies_while_forming, 4, tmp_path) as (group, _):
        assert results(group, {1, 2}) == [1001, 1001]


def hangs(rank: int, world_size: int, address: Any, folder: str) -> int:
    me = Rank(rank, world_size, address)

    def hang() -> None:
        signal_test(folder, "hangs")
        os.kill(os.getpid(), signal.SIGSTOP)

    total = me.sum(10**rank, **{"before": hang} if rank == 1 else {})
    me.end()
    return total


def test_nobody_waits_in_a_collective_for_a_rank_that_was_given_up(tmp_path: Path) -> None:
    with started(hangs, 3, tmp_path, str(tmp_path)) as (group, meetings):
        group.wait_for("hangs")
        meetings.give_up.add(1)
        for rank in (0, 2):
            group.processes[rank].join(30)
        os.kill(group.pid(1), signal.SIGKILL)
        assert results(group, {1}) == [101, 101]


def fails_once(rank: int, world_size: int, address: Any, times: int) -> Any:
    me, calls = Rank(rank, world_size, address), []

    def fail() -> None:
        calls.append(1)
        if rank == 1 and len(calls) <= times:
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection reset by peer")

    try:
        return me.sum(10**rank, before=fail), len(calls)
    except RuntimeError as error:
        return str(error)
    finally:
        me.end()


def test_a_collective_that_fails_on_one_rank_is_done_again_on_all_and_not_for_ever(tmp_path: Path) -> None:
    with started(fails_once, 3, tmp_path / "once", 1) as (group, _):
        assert results(group, set()) == [(111, 2)] * 3
    with started(fails_once, 3, tmp_path / "ever", 9) as (group, _):
        texts = results(group, set())
    assert "Connection reset by peer" in texts[1]
    assert all("gloo" in text or "has failed 3 times, and nobody is lost" in text for text in texts)
