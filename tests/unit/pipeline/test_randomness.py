"""The random state as one value, and which numbers the steps of a pipeline draw."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_stale.pipeline.alike.random_state import RandomState, derive, kept, replay
from lightning_stale.pipeline.alike.random_streams import DerivedStreams, Streams, TravellingStream
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.stage import Stage


def draw() -> tuple[Any, ...]:
    """Draw from every global generator, normal numbers too, of which two are made at a time."""
    return float(torch.rand(())), random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())


def test_a_state_is_restored_whole_also_in_another_process() -> None:
    draw()  # so that one normal number is left over
    state = RandomState.now()
    packed = state.pack()
    drawn = [draw(), draw()]
    state.restore()
    assert [draw(), draw()] == drawn
    RandomState.unpack(packed).restore()
    assert [draw(), draw()] == drawn
    assert RandomState.unpack(packed).digest() == state.digest() != RandomState.now().digest()


def test_what_is_kept_is_untouched() -> None:
    state = RandomState.now()
    with kept():
        draw()
    with replay(state):
        inside = draw()
    assert draw() == inside


def test_derived_numbers_follow_from_seed_and_path_alone() -> None:
    paths = [(0, 1), (1, 0), (0, 1, 0), (0, -1)]
    drawn = []
    for path in paths:
        derive(b"seed", path)
        drawn.append(draw())
        derive(b"other", path)
        assert draw() != drawn[-1]
        derive(b"seed", path)
        assert draw() == drawn[-1]
    assert len({number for numbers in drawn for number in numbers}) == 5 * len(paths)


@pytest.mark.parametrize(("name", "place"), [("torch", 0), ("random", 1), ("numpy", 3)])
def test_a_recompute_drops_the_layers_that_the_forward_has_dropped(name: str, place: int) -> None:
    """LayerDrop: another coin in the backward would be the gradient of another network."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
            self.seen: list[list[bool]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append([draw()[place] < 0.5 for _ in self.layers])
            for layer, coin in zip(self.layers, self.seen[-1], strict=True):
                x = layer(x) if coin else x
            return x

    net = Dropped()
    stage = Stage(Block(net), 2, first=True)
    x = torch.randn(3, 4)
    outputs = [stage.forward(n, (x,)) for n in range(3)]
    for n in range(3):
        before = RandomState.now().digest()
        stage.backward(n, [torch.ones_like(outputs[n][0])])
        assert RandomState.now().digest() == before, "what training draws besides goes on"
    assert net.seen[:3] == net.seen[3:]
    assert net.seen[0] != net.seen[1]


def steps(streams: list[Streams], dropout: int = 3) -> list[Any]:
    """Draw as two ranks do in three batches: each the whole step, and one of two blocks; return both ranks' draws."""
    found = []
    states = [RandomState.now()] * 2
    for n in range(3):
        told = b""
        for place, block in ((1, 0), (0, 1)):  # the first stage is on rank 1
            states[place].restore()
            mine, after = streams[place], None
            with mine.step((1, n)):
                before = draw()
                if place == 0:
                    mine.hear(told)
                with mine.body():
                    mine.block(block)
                    inside = [draw() for _ in range(dropout)]
                told = mine.tell()
                if place == 0:
                    after = draw()
            with mine.apart():
                mine.own((0, place, n))
                own = draw()
            found.append((n, place, before, inside, after, own))
            states[place] = RandomState.now()
        if isinstance(streams[0], TravellingStream):
            states[1] = states[0]
    return found


def test_one_stream_goes_through_all_stages_as_through_one_process() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [[draw() for _ in range(9)] for _ in range(3)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    found = steps([TravellingStream(None), TravellingStream(DerivedStreams(b"seed"))])
    for n in range(3):
        (_, _, first, one, _, apart), (_, _, last, two, after, own) = found[2 * n : 2 * n + 2]
        assert first == last == expected[n][0]
        assert [*one, *two, after, own] == expected[n][1:]
        assert apart not in expected[n]


def test_derived_streams_are_the_same_in_all_processes_and_change_nothing_between_steps() -> None:
    between = RandomState.now().digest()
    found = steps([DerivedStreams(b"seed")] * 2)
    assert RandomState.now().digest() == between
    for n in range(3):
        (_, _, first, one, _, _), (_, _, last, two, _, _) = found[2 * n : 2 * n + 2]
        assert first == last
        assert one != two, "each block has masks of its own"
    numbers = [x for entry in found for draws in (*entry[3], entry[4], entry[5]) for x in draws or ()]
    assert len(set(numbers)) == len(numbers), "no number twice"
    assert [entry[2:] for entry in steps([DerivedStreams(b"seed")] * 2)] == [entry[2:] for entry in found]


def test_nothing_is_done_where_one_process_draws_everything() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [draw(), draw(), draw()]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    stream = Streams()
    with stream.step((1, 0)), stream.body():
        stream.block(0)
        found = [draw()]
    with stream.apart():
        stream.own((0, 0))
        assert [*found, draw(), draw()] == expected
    assert stream.tell() == b""
