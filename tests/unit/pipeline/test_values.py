"""What travels between two stages comes out as it went in, in one process as between two; the rest is refused."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree

from lightning_stale import DSPStrategy
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Stage
from lightning_stale.pipeline.values import strides
from lightning_stale.pipeline.values.trees import map_tensors, put_together, take_apart, tensors
from tests.integration.models import trainer
from tests.unit.pipeline.forwards import CASES, Model, loader


class Pair(NamedTuple):
    left: Tensor
    right: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    inner: Any = None
    made: bool = dataclasses.field(default=False, init=False)


@dataclasses.dataclass(slots=True)
class Slots:
    hidden: Tensor
    word: str = "w"


class Output(collections.OrderedDict[str, Any]):
    """As Hugging Face's ModelOutput: a dict with attributes, registered with torch's pytrees."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


pytree._register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="tests.unit.pipeline.test_values.Output",
)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


VALUES: list[Any] = [
    some(3, 2),
    (some(2), [some(1), None], {"a": True, 2: 2.5, (1, "x"): "word"}),
    Pair(some(2), Pair(some(1))),
    Frozen(some(2), Slots(some(1))),
    Output(last_hidden_state=some(2), attentions=(some(1), some(1))),
    pack_sequence([some(3, 2), some(2, 2)]),
    torch.max(some(3, 2), 0),
    collections.OrderedDict(a=some(1)),
    some(3, 2).to_sparse(),
    torch.sparse_coo_tensor(torch.tensor([[0, 0]]), some(2), (3,)),  # not coalesced
    some(3, 2).to_sparse_csr(),
    some(3, 2).to_sparse_csc(),
    [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), 2**80, -(2**63), 1 - 2j, float("inf"), ""],
]


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_is_taken_apart_is_put_together_again(value: Any) -> None:
    tree, found = take_apart(value)
    sent = msgpack.unpackb(msgpack.packb(tree, strict_types=True))
    for made in (put_together(sent, found), map_tensors(lambda tensor: tensor.clone(), value)):
        assert_same_value(made, value)


def assert_same_value(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.layout == right.layout
        assert torch.equal(left.to_dense(), right.to_dense())
    elif isinstance(left, dict):
        assert list(left) == list(right)
        assert_same_value(list(left.values()), list(right.values()))
    elif isinstance(left, (tuple, list)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_value(one, other)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same_value(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


class Foreign:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Subclass(Tensor):
    pass


def local_class() -> Any:
    @dataclasses.dataclass
    class Local:
        hidden: Tensor

    return Local(some(1))


REFUSED: list[tuple[Callable[[Tensor], Any], str]] = [
    (Foreign, r"Foreign cannot travel between stages: .*; return its tensors in a tuple or a dict"),
    (lambda x: np.zeros(2), r"ndarray cannot travel .*; return torch.as_tensor\(\)"),
    (lambda x: np.float64(2), r"float64 cannot travel .*; return .*\.item\(\)"),
    (lambda x: collections.defaultdict(list, a=x), r"type cannot travel"),
    (lambda x: {x: 1}, r"a key that holds tensors cannot travel"),
    (lambda x: x.as_subclass(Subclass), r"Subclass cannot travel .*; return .as_subclass\(torch.Tensor\) of it"),
    (
        lambda x: local_class(),
        r"Local cannot travel .* does not find .*<locals>.Local; define it at the top of a module",
    ),
    (lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), x[0, 0, :2], (3,)), r"not coalesced cannot travel"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED)
@pytest.mark.parametrize("recompute", [True, False])
def test_what_cannot_travel_is_refused_on_virtual_stages_in_the_first_batch(
    make: Callable[[Tensor], Any], says: str, recompute: bool
) -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return make(self.linear(x))

    stages = [
        Stage(Block(Makes()), 1, recompute=recompute, first=True),
        Stage(Block(nn.Identity()), 0, last=True),
    ]
    for run in (Pipeline(stages).forward, Pipeline(stages).evaluate):
        with pytest.raises(TypeError, match=says):
            run((torch.ones(2, 3, 8),))


def test_what_the_first_stage_is_given_does_not_travel_and_may_be_anything() -> None:
    class Reads(nn.Module):
        def forward(self, given: Any) -> Tensor:
            assert isinstance(given["any"], Foreign)
            assert isinstance(given["sub"], Subclass)
            assert "key" in given.values()
            assert given["by type"]["b"] == []
            assert torch.equal(given["by type"]["a"].hidden, some(1))
            return given["any"].hidden + given["x"]

    given = {"any": Foreign(some(2)), "sub": some(1).as_subclass(Subclass), "x": some(2), "type": local_class()}
    given |= {(object(), some(1)): "key", "by type": collections.defaultdict(list, a=local_class())}
    stage = Stage(Block(Reads()), 1, first=True)
    for n in range(2):
        (result,) = stage.forward(n, (given,))
        assert torch.equal(result, 2 * some(2))
        assert stage.backward(n, []) == []


# --- gradients of what travels ----------------------------------------------------------------------------------------


class Wraps(nn.Module):
    """Its result holds tensors in a type of its own."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(torch.tanh(self.linear(x)))


class Unwraps(nn.Module):
    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(4, 4), read

    def forward(self, x: Any) -> Tensor:
        return self.linear(self.read(x))


def sparse(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0).to_sparse()


KINDS: list[Any] = [
    pytest.param(Frozen, lambda value: value.hidden, id="dataclass"),
    pytest.param(lambda x: Slots(Pair(x, 3)), lambda value: value.hidden.left, id="nested"),
    pytest.param(lambda x: Output(last_hidden_state=x), lambda value: value.last_hidden_state, id="ModelOutput"),
    pytest.param(lambda x: torch.complex(x, 2 * x), lambda value: value.real + value.imag, id="complex"),
    pytest.param(lambda x: x.to(torch.complex128).conj(), lambda value: value.abs().float(), id="complex128"),
    pytest.param(sparse, lambda value: torch.sparse.mm(value, torch.ones(4, 4)), id="sparse"),
    pytest.param(
        lambda x: (sparse(x.detach()), x), lambda value: torch.sparse.mm(value[0].t(), value[1]), id="adjacency"
    ),
]


@pytest.mark.parametrize(("wrap", "read"), KINDS)
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_come_back_through_whatever_has_travelled(wrap: Any, read: Any, m: int, recompute: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(Wraps(wrap), Unwraps(read))
    stages = [
        Stage(Block(layers[0]), m, recompute=recompute, first=True),
        Stage(Block(layers[1]), 0, last=True),
    ]
    pipeline, data = Pipeline(stages), [torch.randn(4, 4) for _ in range(3)]
    for x in data:
        result = pipeline.forward((x,))
        assert result is not None
        result[0].square().sum().backward()
        pipeline.backward()
    pipeline.drain(lambda: None)
    got = [parameter.grad for parameter in layers.parameters()]
    layers.zero_grad()
    for x in data:
        layers(x).square().sum().backward()
    for gradient, parameter in zip(got, layers.parameters(), strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert parameter.grad.abs().sum() > 0
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("m", [0, 2])
def test_a_sparse_embedding_within_a_block_is_trained(m: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 1))
    stages = [Stage(Block(layers[0]), m, recompute=False, first=True), Stage(Block(layers[1]), 0, last=True)]
    pipeline = Pipeline(stages)
    for n in range(3):
        result = pipeline.forward((torch.tensor([n, 3, 3]),))
        assert result is not None
        result[0].sum().backward()
        pipeline.backward()
    pipeline.drain(lambda: None)
    gradient = layers[0].weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    expected = torch.tensor([1.0, 1, 1, 6, 0, 0, 0])[:, None] * layers[1].weight
    torch.testing.assert_close(gradient.to_dense(), expected)


# --- what requires no gradient ----------------------------------------------------------------------------------------


class Passes(nn.Module):
    """Passes on its input, a mask of floating point, indices, and what a frozen and a trained layer make."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

    def forward(self, given: Any) -> Any:
        x = given if isinstance(given, Tensor) else given[-1]
        return (
            x,
            torch.ones(4),
            torch.arange(4),
            self.frozen(given if isinstance(given, Tensor) else given[0]),
            self.trained(x),
        )


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("recompute", [True, False])
def test_what_needs_no_gradient_stays_so_and_sends_none_back(m: int, recompute: bool) -> None:
    first = Stage(Block(Passes()), m, recompute=recompute, first=True)
    (sent,) = first.forward(0, (some(2, 4),))
    assert [tensor.requires_grad for tensor in sent] == [False, False, False, False, True]
    second = Stage(Block(Passes()), m, recompute=recompute)
    (sent,) = second.forward(0, (sent,))
    assert [tensor.requires_grad for tensor in sent] == [True, False, False, False, True]
    assert all(tensor.grad_fn is None for tensor in sent)
    gradients = second.backward(0, [torch.ones(2, 4), torch.ones(2, 4)])
    assert len(gradients) == 1, "that of what the first stage has trained"
    assert first.backward(0, gradients) == []


def test_a_forward_that_differs_when_it_is_run_again_is_an_error() -> None:
    class Drops(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) if self.calls == 1 else x

    stage = Stage(Block(Drops()), 1, first=True)
    stage.forward(0, (some(2, 4),))
    with pytest.raises(RuntimeError, match=r"1 required a gradient, and when it ran again .* 0 of 1: make its forward"):
        stage.backward(0, [torch.ones(2, 4)])


def test_what_is_unfrozen_between_forward_and_backward_waits_for_the_next_batch() -> None:
    block = nn.Linear(4, 4).requires_grad_(False)
    stage = Stage(Block(block), 1, first=True)
    stage.forward(0, (some(2, 4),))
    block.requires_grad_(True)
    stage.backward(0, [])
    assert block.weight.grad is None
    stage.forward(1, (some(2, 4),))
    stage.backward(1, [torch.ones(2, 4)])
    assert block.weight.grad is not None


def test_a_layer_that_is_dropped_in_the_first_stage_sends_on_data() -> None:
    """LayerDrop: what comes out needs a gradient in some batches only."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    block = Dropped()
    pipeline = Pipeline([Stage(Block(block), 2, first=True), Stage(Block(nn.Linear(4, 1)), 0, last=True)])
    for sign in (1.0, -1.0, 1.0, -1.0):
        result = pipeline.forward((sign * torch.ones(2, 4),))
        assert result is not None
        result[0].sum().backward()
        pipeline.backward()
    pipeline.drain(lambda: None)
    assert block.linear.weight.grad is not None
    weight = pipeline.stages[1].block.module.weight
    torch.testing.assert_close(block.linear.weight.grad, 4 * weight.t().expand(4, 4))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.tanh(x.transpose(1, 2).contiguous()),
        lambda x: x.mean(),
        lambda x: (x.unsqueeze(1).contiguous(memory_format=torch.channels_last) * 2).exp(),
    ],
    ids=["transposed", "expanded", "channels_last"],
)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("m", [0, 1])
def test_gradients_come_out_of_a_block_with_the_strides_that_they_have_in_it(
    how: Callable[[Tensor], Tensor], recompute: bool, m: int
) -> None:
    x = some(2, 3, 8).requires_grad_()
    inner, seen = x * 1, []
    inner.register_hook(lambda gradient: seen.append(gradient))
    y = how(inner)
    gradient = torch.ones_like(y)
    y.backward(gradient)

    class Does(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return how(x)

    stage = Stage(Block(Does()), m, recompute=recompute)
    stage.forward(0, (x,))
    (got,) = stage.backward(0, [gradient])
    assert got is not None
    assert torch.equal(got, seen[0])
    assert got.stride() == seen[0].stride()


# --- strides ----------------------------------------------------------------------------------------------------------

KEPT: list[Any] = [
    some(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    some(2, 3, 1, 1).contiguous(memory_format=torch.channels_last),
    some(4, 6).t(),
    some(3, 1).expand(3, 4),
    some(1, 4, 1).expand(2, 4, 5).transpose(0, 1),
    some(2, 9)[:, 3:6],
    some(2, 4, 6).chunk(3, -1)[1].transpose(1, 2),
    torch.tensor(3.0),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.arange(6).view(2, 3).t(),
    some(4).to(torch.bfloat16),
    torch.complex(some(3, 2), some(3, 2)).t(),
]
"""What arrives with the very strides."""
ELSE: list[Any] = [
    some(10).unfold(0, 3, 1),  # overlaps
    some(2, 197, 4)[:, 0],  # most of its memory is nobody's
    torch.complex(some(3), some(3)).conj(),
    torch.complex(some(3), some(3)).conj().imag,
]


@pytest.mark.parametrize("tensor", [*KEPT, *ELSE], ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}")
def test_a_tensor_is_restored_from_its_bytes(tensor: Tensor) -> None:
    elements = strides.flat(tensor)
    shape, stride = list(tensor.shape), list(tensor.stride())
    assert elements.is_contiguous()
    assert elements.numel() == strides.flat_size(shape, stride)
    made = strides.restored(elements.clone().view(torch.uint8).view(tensor.dtype), shape, stride)
    copy = strides.copied(tensor)
    assert torch.equal(made, tensor)
    assert torch.equal(copy, tensor)
    if any(tensor is kept for kept in KEPT):
        assert made.stride() == tensor.stride() == copy.stride()


def test_dense_memory_is_sent_without_a_copy_and_expanded_once() -> None:
    image = some(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert strides.flat(image).data_ptr() == image.data_ptr()
    mask = some(1, 4).expand(64, 4)
    assert strides.flat(mask).numel() == 4
    assert strides.flat(mask).data_ptr() == mask.data_ptr()


def test_gradients_flow_through_a_copy() -> None:
    for tensor in (some(2, 9)[:, 3:6], some(3, 1).expand(3, 4), some(4, 6).t()):
        leaf = tensor.detach().requires_grad_()
        (3 * strides.copied(leaf)).sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.full_like(leaf, 3.0))


def test_a_packed_sequence_is_one_again() -> None:
    packed = pack_sequence([some(3, 2), some(2, 2)])
    made = map_tensors(lambda tensor: tensor, packed)
    assert isinstance(made, PackedSequence)
    assert len(tensors(packed)) == 2


@pytest.mark.parametrize("case", ["mask", "channels_last"])
def test_masks_and_strides_are_those_of_the_plain_trainer(case: str) -> None:
    """Strides and the need of a gradient choose kernels."""
    seen: dict[str, list[Any]] = {}
    for name, strategy in (
        ("plain", "auto"),
        ("stale", DSPStrategy(stages=3, staleness="bp", split=list(CASES[case].split), module="net")),
    ):
        model, calls = Model(case), seen.setdefault(name, [])
        for block in model.net:
            block.register_forward_pre_hook(
                lambda _, given, calls=calls: calls.append([(t.stride(), t.requires_grad) for t in tensors(given)])
            )
        trainer(1, strategy, max_epochs=1).fit(model, loader(2))
    assert seen["plain"] == seen["stale"]
