"""A cut by names follows no more than it must; what it cannot follow is said, with a cure that works."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_stale import DSPStrategy
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.partition.body import resolve
from lightning_stale.pipeline.partition.errors import PartitionError
from lightning_stale.pipeline.partition.traced import partition_traced
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Branching, Chain, ResNet, batches


def linear() -> nn.Linear:
    return nn.Linear(6, 6)


class Three(nn.Module):
    """Its subclasses say what they do with three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = linear(), linear(), linear()


def rows(n: int = 3) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(n))


def run(blocks: list[nn.Module], *inputs: Any) -> Any:
    features: tuple[Any, ...] = inputs
    for k, block in enumerate(blocks):
        features = Block(block, spreads=k < len(blocks) - 1)(features)
    return features[0]


# --- what is not on the way to a name is not followed -----------------------------------------------------------------


class Packed(nn.Module):
    """An LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 6), Packed(), linear()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens), lengths))


class Children(nn.Module):
    """A child that branches, one that is compiled, and one that is compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.branching, self.last = Branching(), linear()
        self.wrapped = torch.compile(linear(), backend="eager")
        self.compiled = nn.Sequential(linear(), nn.ReLU())
        self.compiled.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.compiled(self.wrapped(self.branching(x))))


class Loops(nn.Module):
    """Layers in a ModuleDict and a ModuleList, and an encoder of torch as it is."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([linear() for _ in range(3)])
        self.parts = nn.ModuleDict({"embed": nn.Embedding(9, 6), "layers": layers})
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), 2)
        self.head = linear()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.parts["embed"](tokens)
        for layer in self.parts["layers"]:
            x = layer(x)
        return self.head(self.encoder(x))


def tokens() -> Tensor:
    return torch.randint(9, (3, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "names", "inputs"),
    [
        (Tagger, ["head"], lambda: (tokens(), torch.tensor([4, 2, 3]))),
        (Children, ["wrapped", "compiled", "last"], lambda: (rows(),)),
        (Loops, ["parts.layers", "parts.layers.2", "encoder"], lambda: (tokens(),)),
    ],
)
def test_children_without_a_name_in_them_do_as_they_like(network: Any, names: list[str], inputs: Any) -> None:
    torch.manual_seed(0)
    original = network()
    blocks = partition_traced(copy.deepcopy(original), names, "net")
    assert len(blocks) == len(names) + 1
    assert torch.equal(run(blocks, *inputs()), original(*inputs()))


# --- demands are no branches ------------------------------------------------------------------------------------------


class Demanding(Three):
    def forward(self, x: Tensor) -> Tensor:
        _, width = x.size()
        assert width <= 6, "too wide"
        assert 0 < width and x.dim() == 2  # noqa: PT018, SIM300
        if width != 6:
            raise ValueError("not six")
        if not (width == 6):
            raise ValueError("not six")
        if width < 6 or x.dim() != 2:
            message = "no"
            raise ValueError(message)
        return self.three(self.two(self.one(x)))


def test_what_a_forward_demands_is_traced_and_still_demanded() -> None:
    model = Demanding()
    blocks = partition_traced(model, ["two"], "net")
    assert torch.equal(run(blocks, rows()), model(rows()))
    with pytest.raises(ValueError, match=r"do not meet what the model demands .*assert width <= 6"):
        run(blocks, torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"do not meet what the model demands .*if width != 6:"):
        run(blocks, torch.zeros(3, 5))


class Chained(Three):
    def forward(self, x: Tensor) -> Tensor:
        if 1 < x.size(0) < 5:
            raise ValueError("both must hold for it to raise")
        return self.three(self.two(x))


class Alternative(Three):
    def forward(self, x: Tensor) -> Tensor:
        assert x.size(0) == 3 or x.size(0) == 5
        return self.three(self.two(x))


@pytest.mark.parametrize("network", [Chained, Alternative])
def test_a_demand_of_which_a_part_may_go_either_way_is_a_branch(network: Any) -> None:
    with pytest.raises(PartitionError, match="branches on a value"):
        partition_traced(network(), ["three"], "net")


# --- arguments with defaults ------------------------------------------------------------------------------------------


class Optional(Three):
    def forward(self, x: Tensor, mask: Any = None, *more: Any, scale: float = 2.0, **options: Any) -> Tensor:
        return self.three(self.two(x if mask is None else x * mask)) * scale


def test_arguments_keep_their_defaults() -> None:
    model = Optional()
    blocks = partition_traced(model, ["three"], "net")
    assert torch.equal(run(blocks, rows(), None, (), 2.0, {}), model(rows()))
    for values, name in (
        ((torch.ones(6), (), 2.0, {}), "mask=a tensor of shape"),
        ((None, (1,), 2.0, {}), "more="),
        ((None, (), 3.0, {}), "scale=3.0"),
        ((None, (), 2.0, {"a": 1}), "options="),
    ):
        with pytest.raises(ValueError, match=f"the model is given {name}.*, the default: name the argument"):
            run(blocks, rows(), *values)


# --- what cannot be followed ------------------------------------------------------------------------------------------


class Iterating(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.stack([self.two(row) for row in x]))


class Counting(Three):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.size(0)):
            x = self.two(x)
        return self.three(x)


class Measuring(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(x) / len(x))


class Packing(Tagger):
    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(tokens)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn.rnn(packed)[0], batch_first=True)[0])


class Various(Three):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.three(self.two(xs[0]))


class Converting(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(x)) * float(x.sum())


@torch.compile(backend="eager")
def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Compiled(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(doubled(self.two(x)))


FAILURES: list[tuple[Any, list[str], str]] = [
    (Branching, ["two"], r"branches on a value, in .*networks.py:\d+ \(.*if x.sum\(\) > 0.*put that line"),
    (Iterating, ["three"], r"loops over a value.* in .*test_tracing.py:\d+ \(return self.three\(torch.stack"),
    (Counting, ["three"], r"loops as often as a value says, in .*\(for _ in range\(x.size\(0\)\):\)"),
    (Measuring, ["three"], r"calls len\(\) of a value, for which x.size\(0\) would do, in .*len\(x\)\)"),
    (Packing, ["head"], r"packs sequences, whose lengths are values, in .*\(packed = nn.utils.rnn.pack_padded"),
    (Various, ["three"], r"takes \*xs.*, and only what has a name is known .*name its arguments in forward"),
    (Converting, ["three"], r"does what torch.fx cannot follow \(TypeError: float\(\) .*\(return .*float\(x.sum"),
    (Compiled, ["three"], r"calls what torch.compile has made, in .*doubled\(self.two\(x\)\)"),
    (lambda: nn.ModuleList([linear(), linear()]), ["1"], r"it is a ModuleList, which has no forward of its own"),
    (lambda: Loops().encoder, ["layers.1"], r"branches on a value.*call its layers one after the other in a module of"),
]


@pytest.mark.parametrize(("network", "names", "says"), FAILURES)
def test_the_true_cause_and_the_line_are_named(network: Any, names: list[str], says: str) -> None:
    with pytest.raises(PartitionError, match=says) as raised:
        partition_traced(network(), names, "net")
    assert "configure_stages()" in str(raised.value)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Cured(Three):
    """Branching, with that line in a submodule of its own, as its error says."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.branch(self.one(x)))


def test_the_cure_works() -> None:
    model = Cured()
    blocks = partition_traced(model, ["two"], "net")
    for sign in (1, -1):
        assert torch.equal(run(blocks, sign * rows()), model(sign * rows()))


def test_a_name_within_a_compiled_child_is_an_error() -> None:
    with pytest.raises(PartitionError, match=r"'compiled.1' lies within 'compiled' of net, which is compiled as one"):
        partition_traced(Children(), ["compiled.1"], "net")


def test_a_hugging_face_model_is_sent_to_configure_stages() -> None:
    """Without the library: the module's class says where it comes from."""

    class Model(Branching):
        __module__ = "transformers.models.gpt2.modeling_gpt2"

    with pytest.raises(PartitionError, match=r"makes arguments and masks .*define configure_stages\(\).*GPT-2"):
        partition_traced(Model(), ["two"], "net")


# --- names, and how many ----------------------------------------------------------------------------------------------


class Holder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.large = ResNet(), nn.Linear(99, 999)


@pytest.mark.parametrize(
    ("module", "names"),
    [(None, ["model.layer2", "model.layer3.1"]), ("model", ["model.layer2", "model.layer3.1"])],
)
def test_names_from_the_root_are_names_too(module: str | None, names: list[str]) -> None:
    assert resolve(Holder(), module, names) == ("model", ["layer2", "layer3.1"])
    assert resolve(Holder(), "model", ["layer2", "layer3.1"]) == ("model", ["layer2", "layer3.1"])


def test_names_within_the_module_that_is_cut_go_first() -> None:
    holder = Holder()
    holder.large = nn.ModuleDict({"model": nn.ModuleDict({"layer2": nn.Linear(99, 999)})})
    assert resolve(holder, None, ["model.layer2"]) == ("large", ["model.layer2"])


def test_a_split_says_how_many_stages() -> None:
    assert DSPStrategy(split=["layer2", "layer3"]).stages == 3
    assert DSPStrategy(split=[3]).stages == 2
    assert DSPStrategy(split="time").stages is None
    with pytest.raises(ValueError, match=r"split=\['a'\] makes 2 blocks for 3 stages: write stages=2"):
        DSPStrategy(split=["a"], stages=3)
    with pytest.raises(ValueError, match=r"makes 2 blocks for 3 stages"):
        DSPStrategy(split=["a"], staleness=(4, 2, 0))


def test_names_from_the_root_train_as_the_plain_trainer_does() -> None:
    class Named(Chain):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Cured()

        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output[:, :3], target)

    plain, cut = Named(), Named()
    trainer(1, "auto", max_steps=5).fit(plain, batches(5))
    strategy = DSPStrategy(split=["net.two"], staleness="bp")
    trainer(1, strategy, max_steps=5).fit(cut, batches(5))
    assert len(strategy.summary()["stages"]) == 2
    for one, other in zip(plain.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)
