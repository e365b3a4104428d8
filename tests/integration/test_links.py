"""Channels wait for as long as it takes, end with all that is under them, and can be broken off; over processes."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from lightning_stale.pipeline.channels.channel import ChannelError, end
from lightning_stale.pipeline.channels.links import Links, destroy_mesh, stage_mesh
from lightning_stale.pipeline.channels.process import ReceiveChannel, SendChannel
from lightning_stale.pipeline.channels.transfer import GrantedTransfer
from lightning_stale.pipeline.staleness import Staleness
from lightning_stale.transport.groups import break_off, destroy, new_group
from tests.integration.harness import run_workers
from tests.integration.test_channels import CPU, MESSAGES, assert_same_tree, keep_waiting

TIMEOUT = timedelta(seconds=5)
LONG_S = 6.0
LARGE = 1 << 22


@contextmanager
def gloo(rank: int, world_size: int) -> Iterator[None]:
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield
    dist.barrier()
    dist.destroy_process_group()


def running() -> list[str]:
    """Return the threads of this process, those of C++ too."""
    return sorted(Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task"))


def links(world_size: int, check: Any = lambda neighbour, ended: None) -> tuple[Links, Any]:
    mesh = stage_mesh(world_size, CPU)
    return Links(mesh, Staleness.of("dsp", world_size), CPU, check, TIMEOUT), mesh


def link_again_and_again(rank: int) -> None:
    """Three ranks, the last stage on rank 0; each time a message goes down and one up."""
    gc.disable()  # what is in a cycle might go in a forked process, where the end of a group's threads is a crash
    with gloo(rank, 3):
        for turn in range(3):
            linked, mesh = links(3)
            channels = linked.channels
            assert {group._get_backend(CPU).options._timeout for group in linked._groups} == {TIMEOUT}
            if rank == 2:
                time.sleep(LONG_S if turn == 0 else 0.0)  # for longer than the time limit of the group
                channels["features_out"].send(0, torch.ones(3))
            else:
                value = channels["features_in"].receive(0)
                if rank == 1:
                    channels["features_out"].send(0, value)
                else:
                    channels["gradients_out"].send(0, value)
            if rank > 0:
                value = channels["gradients_in"].receive(0)
                assert torch.equal(value, torch.ones(3))
                if rank == 1:
                    channels["gradients_out"].send(0, value)
            linked.end()
            destroy_mesh(mesh)
            del linked, mesh, channels
            now = (running(), sorted(group.group_name for group in _world.pg_map))
            if turn == 0:
                first = now  # one of them may be about to end
            deadline = time.monotonic() + 10
            while len(now[0]) > len(first[0]) and time.monotonic() < deadline:
                time.sleep(0.01)
                now = (running(), now[1])
            assert len(now[0]) <= len(first[0]), f"{first[0]} are now {now[0]}"  # more in each turn, if they are left
            assert now[1] == first[1]
            assert len(now[1]) == 1, now[1]


def test_links_wait_beyond_the_time_limit_and_leave_nothing(tmp_path: Path) -> None:
    run_workers(link_again_and_again, 3, tmp_path)


def wait_and_be_woken(rank: int) -> str:
    """Rank 1 hangs; rank 0 waits to receive, and to send more than a socket holds, until it breaks off."""
    with gloo(rank, 2):
        heard = threading.Event()

        def check(neighbour: int, ended: bool) -> None:
            if heard.is_set():
                raise RuntimeError("rank 1 hangs")

        linked, mesh = links(2, check)
        if rank == 1:
            dist.barrier()  # until the other one has broken off
            assert linked.channels["gradients_in"].receive(0).numel() == LARGE
            with pytest.raises(ChannelError, match="rank 0 has ended"):
                linked.channels["gradients_in"].receive(1)
        else:
            for n in range(2):  # of which one finds room
                linked.channels["gradients_out"].send(n, torch.zeros(LARGE))
            heard.set()
            with pytest.raises(RuntimeError, match="rank 1 hangs"):
                linked.channels["features_in"].receive(0)
            with pytest.raises(RuntimeError, match="rank 1 hangs"):
                linked.end()
            assert [thread.name for thread in threading.enumerate() if "Channel" in thread.name] == []
            dist.barrier()
        linked.break_off()
        linked.break_off()  # at exit, say
        destroy_mesh(mesh)
        return str(sorted(group.group_name for group in _world.pg_map))


def test_what_hangs_is_broken_off(tmp_path: Path) -> None:
    assert len(set(run_workers(wait_and_be_woken, 2, tmp_path))) == 1


def wake_a_sum(rank: int) -> str:
    """Rank 1 never begins a sum that rank 0 waits for."""
    with gloo(rank, 2):
        group, text = new_group([0, 1], timedelta(minutes=5)), ""
        if rank == 0:
            work = dist.all_reduce(torch.ones(1000), group=group, async_op=True)
            break_off(group)
            with pytest.raises(RuntimeError) as caught:
                work.wait()
            text = str(caught.value)
        destroy(group)
        destroy(group)
        return text


def test_a_sum_in_flight_is_broken_off(tmp_path: Path) -> None:
    assert "pair closure" in run_workers(wake_a_sum, 2, tmp_path)[0]


def exchange_with_grants(rank: int) -> Any:
    """As over NCCL, whose operations occupy the device: only what both sides are ready for is begun."""
    with gloo(rank, 2):
        control, data = new_group([0, 1], TIMEOUT), new_group([0, 1], TIMEOUT)
        if rank == 0:
            sender = SendChannel(1, control, 1, CPU, keep_waiting, GrantedTransfer(1, CPU, data, control))
            for n, message in enumerate(MESSAGES):
                sender.send(n, message)
            end([sender], lambda: None)
            return sender._error
        grants = threading.Lock()
        with grants:  # a collective
            receiver = ReceiveChannel(
                0, control, len(MESSAGES), CPU, keep_waiting, GrantedTransfer(0, CPU, data, control, grants)
            )
            time.sleep(0.3)
            assert receiver._inbox.empty()
        got = [receiver.receive(n) for n in range(len(MESSAGES))]
        with grants:
            pass
        end([receiver], lambda: None)
        return got


def test_a_transfer_begins_once_it_is_granted(tmp_path: Path) -> None:
    error, got = run_workers(exchange_with_grants, 2, tmp_path)
    assert error is None
    for sent, received in zip(MESSAGES, got, strict=True):
        assert_same_tree(sent, received)
