"""Blocks are balanced, and composed they are the original, forward and backward, bit for bit."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stale import DSPStrategy
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.partition.body import find_body
from lightning_stale.pipeline.partition.costs import count_parameters, measure_layers
from lightning_stale.pipeline.partition.disjoint import check_disjoint
from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.pipeline.partition.sequential import balanced_starts, check_starts, partition_sequential
from lightning_stale.pipeline.partition.traced import partition_traced
from tests.integration.models import trainer
from tests.unit.pipeline.networks import GPT, Branching, Chain, ResNet, Skips, batches


def costs_of(costs: list[float], starts: list[int]) -> list[float]:
    bounds = [0, *starts, len(costs)]
    return [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]


# --- where to cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_twenty_uneven_layers_are_balanced_within_ten_percent(stages: int) -> None:
    widths = [30, 34, 32, 40, 36, 30, 44, 38, 32, 30, 46, 34, 30, 42, 36, 40, 32, 38, 34, 44, 30]
    body = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    assert len(body) == 20
    starts = balanced_starts([count_parameters(layer) for layer in body], stages)
    blocks = [count_parameters(block) for block in partition_sequential(body, starts)]
    assert sum(blocks) == count_parameters(body)
    assert max(blocks) <= 1.1 * sum(blocks) / stages


@settings(deadline=None)
@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=8), data=st.data())
def test_no_other_cut_is_better_balanced(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    starts = balanced_starts(costs, stages)
    best = min(max(costs_of(costs, list(other))) for other in itertools.combinations(range(1, len(costs)), stages - 1))
    assert max(costs_of(costs, starts)) == best
    assert check_starts(starts, len(costs), stages) == starts


def test_fewer_layers_than_stages_is_an_error() -> None:
    with pytest.raises(PartitionError, match=r"2 layers cannot be cut into 3 blocks: write stages=2 or less"):
        balanced_starts([1, 1], 3)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ([3], r"split=\[3\] makes 2 blocks for 3 stages: write 2 integers, e.g. split=\[3, 7\]"),
        ([0, 3], r"split=\[0, 3\]: write increasing integers between 1 and 9"),
        ([3, 10], r"split=\[3, 10\]: write increasing integers between 1 and 9"),
        ([6, 3], r"split=\[6, 3\]: .* e.g. split=\[3, 7\]"),
        ([3, 3], r"split=\[3, 3\]: write increasing"),
    ],
)
def test_integers_that_make_no_blocks_are_an_error(split: list[int], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        check_starts(split, layers=10, stages=3)


def test_integers_say_where_further_blocks_start() -> None:
    body = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    cut = partition_sequential(body, check_starts([1, 4], 5, 3))
    assert [[name for name, _ in block.named_children()] for block in cut] == [["0"], ["1", "2", "3"], ["4"]]
    assert list(cut[1].children()) == list(body.children())[1:4], "the layers themselves, not copies"


class Sleep(nn.Module):
    def __init__(self, forward_s: float, parameters: int) -> None:
        super().__init__()
        self.forward_s = forward_s
        self.weight = nn.Parameter(torch.ones(parameters))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        self.calls += 1
        return x * self.weight.mean()


class Sleeping(Chain):
    def __init__(self) -> None:
        super().__init__()
        costs = [(0.005, 50), (0.005, 1), (0.005, 1), (0.015, 1), (0.015, 1)]
        self.net = nn.Sequential(*(Sleep(seconds, parameters) for seconds, parameters in costs))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()


def test_split_by_time_measures_what_training_will_run_and_changes_nothing() -> None:
    model = Sleeping()
    seconds = measure_layers(model.net, torch.zeros(4, 6), repetitions=2)
    assert balanced_starts(seconds, 3) == [3, 4]
    assert balanced_starts([count_parameters(layer) for layer in model.net], 3) == [1, 2], "parameters say otherwise"
    assert all(buffer == 0 for buffer in model.net.buffers())
    assert all(parameter.grad is None for parameter in model.net.parameters())

    strategy = DSPStrategy(stages=3, staleness="bp", split="time")
    torch.manual_seed(3)
    trainer(1, strategy, max_steps=2).fit(model, batches(2))
    assert [row["parameters"] for row in strategy.summary()["stages"]] == [52, 1, 1]
    assert all(buffer == 2 for buffer in model.net.buffers()), "two training steps, and not the measurement"


class InPlace(Chain):
    """As torchvision's AlexNet and VGG: activations among the children, in place."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.net = nn.Sequential(relu, nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), relu, nn.Linear(8, 3))


def test_split_by_time_takes_in_place_layers_and_leaves_their_input_alone() -> None:
    body, x = InPlace().net, rows(3)
    before, gradient = x.clone(), torch.ones(8)
    body[1].bias.grad = gradient
    assert len(measure_layers(body, x, repetitions=2)) == 6
    assert torch.equal(x, before)
    assert body[1].bias.grad is gradient
    assert torch.equal(gradient, torch.ones(8))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_split_by_time_measures_in_the_precision_of_training(precision: Any) -> None:
    class Noting(InPlace):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.net[1].register_forward_hook(lambda module, given, result: self.seen.append(result.dtype))

    model = Noting()
    strategy = DSPStrategy(stages=3, staleness="bp", split="time")
    trainer(1, strategy, max_steps=1, precision=precision).fit(model, batches(2))
    assert len(model.seen) == 5 + 1
    assert len(set(model.seen)) == 1


# --- what to cut ------------------------------------------------------------------------------------------------------


class Holder(L.LightningModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_the_body_is_the_sequential_with_most_parameters() -> None:
    small, large = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(9, 9), nn.Sequential(nn.Linear(2, 2)))
    model = Holder(head=small, inner=Holder(body=large), other=nn.Linear(99, 99))
    assert find_body(model, None, sequential=True) == "inner.body"
    assert find_body(model, "head", sequential=True) == "head"
    assert find_body(model, None, sequential=False) == "other"


def test_a_compiled_body_is_seen_through() -> None:
    body = nn.Sequential(nn.Linear(2, 2))
    assert find_body(Holder(net=torch.compile(body)), None, sequential=True) == "net"


def test_what_is_not_there_is_named_with_the_alternatives() -> None:
    with pytest.raises(PartitionError, match=r"module='boby' is not a module of Holder: it has 'body', 'body.0'"):
        find_body(Holder(body=nn.Sequential(nn.Linear(2, 2))), "boby", sequential=True)
    with pytest.raises(PartitionError, match=r"Holder has no nn.Sequential .*split=.*module=.*configure_stages"):
        find_body(Holder(net=nn.Linear(2, 2)), None, sequential=True)


# --- traced models ----------------------------------------------------------------------------------------------------


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))


def tokens(n: int) -> Tensor:
    return torch.randint(11, (n, 6 if n > 1 else 4), generator=torch.Generator().manual_seed(n))


def rows(n: int) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(n))


TRACED = [
    (ResNet, ["layer2", "layer3"], images),
    (ResNet, ["layer1.1", "layer2.0.conv2", "fc"], images),  # within a residual connection
    (GPT, ["h.1", "h.3"], tokens),
    (GPT, ["h.0", "h.2.mlp", "head"], tokens),
    (Skips, ["down2", "middle", "up2", "up1"], rows),
]


def compose(blocks: list[nn.Module], x: Tensor, *rest: Any) -> Tensor:
    features: tuple[Any, ...] = (x, *rest)
    for k, block in enumerate(blocks):
        features = Block(block, spreads=k < len(blocks) - 1)(features)
    return features[0]


@pytest.mark.parametrize(("network", "names", "data"), TRACED)
def test_the_blocks_composed_are_the_original_bit_for_bit(network: Any, names: list[str], data: Any) -> None:
    torch.manual_seed(1)
    original = network()
    body = copy.deepcopy(original)
    blocks = partition_traced(body, names, "net")
    check_disjoint([Block(block) for block in blocks])
    assert sum(count_parameters(block) for block in blocks) == count_parameters(original)
    rest = (None,) if network is GPT else ()
    for n in (5, 3, 1 if network is not ResNet else 2):  # batch sizes change; of the GPT, the length too
        expected, got = original(data(n), *rest), compose(blocks, data(n), *rest)
        assert torch.equal(expected, got)
        expected.square().sum().backward()
        got.square().sum().backward()
    for (name, p), q in zip(original.named_parameters(), body.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(original.named_buffers(), body.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name


def test_a_block_starts_where_its_name_says() -> None:
    blocks = partition_traced(ResNet(), ["layer2", "layer3"], "net")
    first = [name.split(".")[0] for name, _ in blocks[0].named_parameters()]
    second = {name.split(".")[0] for name, _ in blocks[1].named_parameters()}
    third = {name.split(".")[0] for name, _ in blocks[2].named_parameters()}
    assert set(first) == {"conv1", "bn1", "layer1"}
    assert (second, third) == ({"layer2"}, {"layer3", "fc"})


def test_a_traced_model_follows_train_and_eval() -> None:
    """``F.dropout(x, p, self.training)`` is traced as what it was at the time."""
    torch.manual_seed(1)
    original = GPT(dropout=0.5)
    body = copy.deepcopy(original)
    blocks = partition_traced(body, ["h.2"], "net")
    for mode in (True, False, True):
        original.train(mode)
        body.train(mode)
        torch.manual_seed(2)
        expected = original(tokens(5))
        torch.manual_seed(2)
        assert torch.equal(compose(blocks, tokens(5), None), expected)


class Drops(nn.Module):
    """Asks for its mode, and for a probability that a schedule changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(x.abs().sum()) >= 0:  # a value: what holds no cut is not traced
            x = F.dropout(x, self.p, self.training)
        return self.linear(x)


class Outer(nn.Module):
    """Its forward asks for ``self.training`` between submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(Drops(), Drops()), Drops()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(self.one(x), 0.5, self.training))


def same_draws(body: nn.Module, blocks: list[nn.Module]) -> None:
    torch.manual_seed(2)
    expected = body(rows(5))
    torch.manual_seed(2)
    assert torch.equal(compose(blocks, rows(5)), expected)


def test_parts_may_be_frozen_and_schedules_change_what_a_forward_reads_after_the_cut() -> None:
    body = Outer()
    blocks = partition_traced(body, ["two"], "net")
    same_draws(body, blocks)
    body.one.eval()  # as a hook does that freezes a part at the start of an epoch
    same_draws(body, blocks)
    body.train()
    body.two.p = 0.9
    same_draws(body, blocks)
    body.eval()
    same_draws(body, blocks)


def test_a_mode_that_the_trace_has_not_seen_is_an_error_with_the_cure() -> None:
    class Nested(Outer):
        def __init__(self) -> None:
            super().__init__()
            self.three = Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.three(super().forward(x))

    body = Nested()
    blocks = partition_traced(body, ["three.two"], "net")
    same_draws(body, blocks)
    body.three.eval()
    with pytest.raises(
        RuntimeError, match=r"Outer is in eval mode, .* put it there before fit, or define configure_st"
    ):
        compose(blocks, rows(5))
    blocks = partition_traced(body, ["three.two"], "net")  # before fit
    same_draws(body, blocks)


def test_a_result_that_is_asked_what_it_is_is_traced_through() -> None:
    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.linear(x), None

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Tuples(), Tuples()

        def forward(self, x: Tensor) -> Tensor:
            for block in (self.one, self.two):
                (x, *_) = block(x)
            return x

    body = Reads()
    assert torch.equal(compose(partition_traced(body, ["two"], "net"), rows(3)), body(rows(3)))


def test_cutting_leaves_the_state_dict_as_it_was() -> None:
    class Outside(nn.Module):
        """Reads a buffer of a submodule, which is in no state_dict()."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.one.register_buffer("shift", torch.ones(6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) + self.one.shift)

    body = Outside()
    names = list(body.state_dict())
    blocks = partition_traced(body, ["two"], "net")
    assert torch.equal(compose(blocks, rows(3)), body(rows(3)))
    assert list(body.state_dict()) == names


def test_what_cannot_be_cut_gets_an_error_with_the_alternatives() -> None:
    with pytest.raises(PartitionError, match=r"net \(Branching\) cannot be traced") as raised:
        partition_traced(Branching(), ["two"], "net")
    for alternative in ("nn.Sequential", "DSPStrategy(module=...)", "configure_stages()"):
        assert alternative in str(raised.value)
    with pytest.raises(PartitionError, match=r"'layer9' is not a submodule of net; it has 'conv1', 'bn1', .*'layer3'"):
        partition_traced(ResNet(), ["layer2", "layer9"], "net")
    with pytest.raises(PartitionError, match=r"'layer1' is not called after the ones before it in net"):
        partition_traced(ResNet(), ["layer2", "layer1"], "net")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.wte(tokens)))


def test_a_parameter_shared_across_a_cut_is_an_error() -> None:
    blocks = [Block(block) for block in partition_traced(Tied(), ["middle"], "net")]
    with pytest.raises(ValueError, match=r"blocks 0 and 1 share a parameter \('wte.weight' and 'head.weight'\)"):
        check_disjoint(blocks)


class Everywhere(nn.Module):
    """Uses a buffer, and if asked to a parameter, in all blocks."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("shift", torch.arange(6.0))
        self.gain = nn.Parameter(torch.ones(6)) if parameter else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * self.one(x) + self.shift
        return self.three(self.two(x)) * self.gain + self.shift


def test_a_buffer_of_all_blocks_is_held_by_each_and_a_parameter_refused() -> None:
    model = Everywhere(parameter=False)
    blocks = partition_traced(model, ["two", "three"], "net")
    features = Block(blocks[1], spreads=True)(Block(blocks[0], spreads=True)((rows(4),)))
    assert len(features) == 1, "the buffer does not travel"
    assert torch.equal(blocks[2](*features), model(rows(4)))
    with pytest.raises(ValueError, match=r"blocks 0 and 2 share a parameter \('gain' and 'gain'\)"):
        check_disjoint(
            [Block(block) for block in partition_traced(Everywhere(parameter=True), ["two", "three"], "net")]
        )


def test_a_module_that_comes_twice_runs_twice() -> None:
    activation = nn.ReLU()
    body = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 4))
    blocks = partition_sequential(body, [2])
    x = torch.randn(3, 4)
    assert [len(block) for block in blocks] == [2, 3]
    assert torch.equal(blocks[1](blocks[0](x)), body(x))
