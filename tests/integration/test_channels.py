"""Messages between processes: what they carry, their order, and that no combination of queues and speeds deadlocks."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.channels.channel import ChannelError, end
from lightning_stale.pipeline.channels.process import ReceiveChannel, SendChannel
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Stage
from lightning_stale.pipeline.staleness import Staleness
from tests.integration.harness import run_workers
from tests.unit.pipeline.test_values import REFUSED, Frozen, Pair

CPU = torch.device("cpu")
COMBINATIONS = 200
RANKS = 4
Groups = dict[tuple[int, int], tuple[dist.ProcessGroup, dist.ProcessGroup]]


def keep_waiting(ended: bool) -> None:
    """Break nothing off."""


@contextmanager
def gloo(rank: int, world_size: int) -> Iterator[Groups]:
    """Yield two groups for each two neighbours: down and up."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    yield {(a, b): (dist.new_group([a, b]), dist.new_group([a, b])) for a, b in pairwise(range(world_size))}
    dist.barrier()
    dist.destroy_process_group()


class Step(nn.Module):
    """A layer that takes a random time forward and backward."""

    def __init__(self, draw: random.Random, longest_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.draw, self.longest_s = draw, longest_s

    def forward(self, x: Tensor) -> Tensor:
        self.wait()
        y = torch.tanh(self.linear(x))
        if y.requires_grad:
            y.register_hook(self.wait)
        return y

    def wait(self, *_: Any) -> None:
        if self.longest_s:
            time.sleep(self.draw.uniform(0, self.longest_s))


def run(pipeline: Pipeline, data: list[Tensor]) -> list[Tensor]:
    """Train the stages of ``pipeline`` on ``data``, and drain; return their weights."""
    parameters = [p for stage in pipeline.stages for p in stage.block.module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for x in data:
        result = pipeline.forward((x,))
        if result is not None:
            result[0].square().sum().backward()
        pipeline.backward()
        step()
    pipeline.drain(step)
    return [p.detach().clone() for p in parameters]


def combine(rank: int, combinations: int) -> int:
    """Run random combinations, the same ones on all ranks; return in how many the weights were as they should be."""
    right = 0
    with gloo(rank, RANKS) as groups:
        for number in range(combinations):
            draw = random.Random(number)
            lags = [draw.randint(0, 3) for _ in range(RANKS - 1)]
            m = tuple(sum(lags[k:]) for k in range(RANKS))
            staleness = Staleness.of(m, RANKS, (*(draw.randint(0, lag) for lag in lags), 0))
            recompute, length = draw.random() < 0.5, draw.randint(1, 9)
            slowest = [draw.choice([0.0, 0.0005, 0.003]) for _ in range(RANKS)]
            torch.manual_seed(number)
            layers = [Step(random.Random(number + k), slowest[k]) for k in range(RANKS)]
            quick = copy.deepcopy(layers)
            data = [torch.randn(draw.randint(1, 4), 3) for _ in range(length)]

            def stages(layers: list[Any], m: tuple[int, ...] = m, recompute: bool = recompute) -> list[Stage]:
                last = len(layers) - 1
                return [
                    Stage(Block(layer), m[k], recompute=recompute, first=k == 0, last=k == last)
                    for k, layer in enumerate(layers)
                ]

            links = channels(rank, groups, staleness)
            got = run(Pipeline([stages(layers)[rank]], **links), data)
            end(links.values(), lambda: None)
            for layer in quick:
                layer.longest_s = 0.0
            expected = run(Pipeline(stages(quick)), data)[2 * rank : 2 * rank + 2]
            right += all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return right


def channels(rank: int, groups: Groups, staleness: Staleness) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if rank > 0:
        down, up = groups[rank - 1, rank]
        made["features_in"] = ReceiveChannel(rank - 1, down, staleness.p[rank - 1], CPU, keep_waiting)
        made["gradients_out"] = SendChannel(rank - 1, up, staleness.q[rank], CPU, keep_waiting)
    if rank < RANKS - 1:
        down, up = groups[rank, rank + 1]
        made["features_out"] = SendChannel(rank + 1, down, staleness.p[rank], CPU, keep_waiting)
        made["gradients_in"] = ReceiveChannel(rank + 1, up, staleness.q[rank + 1], CPU, keep_waiting)
    return made


def test_random_combinations_never_deadlock_and_always_compute_the_same(tmp_path: Path) -> None:
    assert run_workers(combine, RANKS, tmp_path, COMBINATIONS) == [COMBINATIONS] * RANKS


# --- messages ---------------------------------------------------------------------------------------------------------

MESSAGES: list[Any] = [
    torch.arange(6.0).view(2, 3),
    torch.arange(6.0).view(2, 3).t(),  # not contiguous
    (torch.ones(2, dtype=torch.bfloat16), [torch.tensor(3), None], {"a": torch.tensor([True, False]), "b": 2.5}),
    {"size": torch.Size([2, 3]), "word": "x", "flag": True, "empty": torch.zeros(0, 3), "int": torch.arange(3)},
    {"size": torch.Size([4, 3]), "word": "x", "flag": True, "empty": torch.zeros(0, 3), "int": torch.arange(3)},
    [None, torch.zeros(5, dtype=torch.float64), None],
    [],
    torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    {
        "mask": torch.arange(3.0).expand(2, 3),
        "third": torch.arange(12.0).view(2, 6).chunk(3, -1)[1],
        "type": torch.half,
    },
    Pair(torch.ones(2, requires_grad=True), Frozen(torch.complex(torch.ones(2), torch.ones(2)).conj())),
    pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]),
]


def exchange(rank: int, length: int) -> list[Any]:
    with gloo(rank, 2) as groups:
        group = groups[0, 1][0]
        if rank == 0:
            sender = SendChannel(1, group, length, CPU, keep_waiting)
            for n, message in enumerate(MESSAGES):
                sender.send(n, message)
            x = torch.ones(2, 3, 8, requires_grad=True)
            refused = [raised(lambda make=make: sender.send(99, make(x))) for make, _ in REFUSED]
            sender.close()
            sender.join(10.0)
            return refused
        receiver = ReceiveChannel(0, group, length, CPU, keep_waiting)
        got = [receiver.receive(n) for n in range(len(MESSAGES))]
        got.append(raised(lambda: receiver.receive(99)))
        receiver.close()
        return got


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ChannelError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_message_arrives_as_it_was_sent(tmp_path: Path) -> None:
    refused, got = run_workers(exchange, 2, tmp_path, 1)
    for sent, received in zip(MESSAGES, got[:-1], strict=True):
        assert_same_tree(sent, received)
    assert got[-1] == "ChannelError: rank 0 has ended: it has closed the channel"
    for text, (_, says) in zip(refused, REFUSED, strict=True):
        assert re.search(says, text), "as on virtual stages"


def assert_same_tree(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert left.stride() == right.stride()
        assert left.requires_grad == right.requires_grad
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same_tree(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_tree(one, other)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same_tree(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


def mismatch(rank: int) -> str | None:
    with gloo(rank, 2) as groups:
        if rank == 0:
            sender = SendChannel(1, groups[0, 1][0], 1, CPU, keep_waiting)
            sender.send(3, torch.ones(2))
            sender.close()
            sender.join(10.0)
            return None
        receiver = ReceiveChannel(0, groups[0, 1][0], 1, CPU, keep_waiting)
        text = raised(lambda: receiver.receive(2))
        receiver.close()
        return text


def test_a_message_of_another_batch_is_an_error(tmp_path: Path) -> None:
    assert run_workers(mismatch, 2, tmp_path)[1] == (
        "ChannelError: a message of batch 3 where that of batch 2 was expected"
    )


LARGE = 1 << 20  # more than a socket's buffers hold


def run_ahead(rank: int, length: int) -> Any:
    """Rank 0 sends; rank 1 receives nothing until rank 0 says that it got through, or is stuck."""
    with gloo(rank, 2) as groups:
        group, back = groups[0, 1]
        if rank == 0:
            sender = SendChannel(1, group, length, CPU, keep_waiting)
            for n in range(length):
                sender.send(n, torch.full((LARGE,), float(n)))  # must not wait for the receiver
            dist.send(torch.zeros(1), 1, back)
            sender.close()
            sender.join(30.0)
            return None
        receiver = ReceiveChannel(0, group, length, CPU, keep_waiting)
        dist.recv(torch.zeros(1), 0, back)
        got = [float(receiver.receive(n)[0]) for n in range(length)]
        receiver.close()
        return got


def test_a_sender_is_not_blocked_within_the_queue(tmp_path: Path) -> None:
    assert run_workers(run_ahead, 2, tmp_path, 3)[1] == [0.0, 1.0, 2.0]
