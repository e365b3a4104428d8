"""Ranks that own parts of a model and its optimizer, side by side in one process, make up the whole again."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stale.pipeline.divided.meta_device import assign, initialize, on_meta
from lightning_stale.pipeline.divided.model import DividedModel
from lightning_stale.pipeline.divided.optimizer import DividedOptimizer
from lightning_stale.pipeline.divided.ownership import constant_names, own_names
from lightning_stale.pipeline.divided.tensors import adopt, tensors_of, without_meta
from tests.integration.models import assert_same


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)  # outside of all blocks
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(5, 2))
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Two groups by kind of parameter, in an order that is not the model's."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("bias")], "lr": 0.1, "weight_decay": 0.0},
        {"params": [p for n, p in named if n.endswith("weight")][::-1], "lr": 0.2, "weight_decay": 0.1},
    ]
    return getattr(torch.optim, name)(groups)  # type: ignore[no-any-return]


def trained(name: str) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model()
    optimizer = optimizer_of(model, name)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


class Rank:
    """One rank of several, which owns ``start`` to ``end`` of the body; the last owns the rest too."""

    def __init__(self, whole: Model, state: dict[str, Any] | None, name: str, bounds: tuple[int, int]) -> None:
        self.model = copy.deepcopy(whole)
        self.optimizer = optimizer_of(self.model, name)
        block = nn.Sequential(*list(self.model.body)[slice(*bounds)])
        self.own = own_names(self.model, [block], [self.model.body], with_rest=bounds[1] == len(self.model.body))
        names = {id(p): n for n, p in self.model.named_parameters()}
        self.share = DividedOptimizer(self.optimizer, names, self.own)
        self.divided = DividedModel(self.model, self.own)
        if state is not None:
            self.share.load(state)

    def values(self) -> dict[str, Tensor]:
        return tensors_of(self.model, self.own)


def merged(ranks: list[Rank]) -> dict[str, Tensor]:
    return {name: value for rank in ranks for name, value in rank.values().items()}


def ranks_of(whole: Model, state: dict[str, Any] | None, name: str, cuts: list[int]) -> list[Rank]:
    return [Rank(whole, state, name, bounds) for bounds in pairwise([0, *cuts, len(whole.body)])]


def assert_same_optimizer(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for place in left["state"]:
        assert_same(left["state"][place], right["state"][place])


def test_every_tensor_has_one_owner_and_the_rest_goes_with_the_last_stage() -> None:
    ranks = ranks_of(Model(), None, "SGD", [1, 3])
    assert [sorted(rank.own) for rank in ranks] == [
        ["body.0.bias", "body.0.weight"],
        [
            *(f"body.1.{name}" for name in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")),
            "body.2.bias",
            "body.2.weight",
        ],
        ["body.3.bias", "body.3.weight", "scratch", "stem.bias", "stem.weight", "step"],
    ]


def test_only_what_is_owned_stays_in_memory() -> None:
    for rank in ranks_of(Model(), None, "Adam", [1, 3]):
        in_memory = {name for name, p in rank.model.named_parameters() if not p.is_meta}
        in_memory |= {name for name, b in rank.model.named_buffers() if not b.is_meta}
        assert in_memory == rank.own
        assert set(rank.values()) == rank.own
        stepped = [p for group in rank.optimizer.param_groups for p in group["params"]]
        assert not any(p.is_meta for p in stepped)
        assert len(stepped) == len([name for name, _ in rank.model.named_parameters() if name in rank.own])
        assert [len(group["params"]) > 0 for group in rank.optimizer.param_groups] == [True, True]
        assert [group["lr"] for group in rank.optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("cuts", [[2], [1, 3], [1, 2, 3]])
def test_a_checkpoint_of_all_ranks_is_that_of_the_whole_and_loads_into_other_cuts(name: str, cuts: list[int]) -> None:
    whole, optimizer = trained(name)
    before = ranks_of(whole, optimizer.state_dict(), name, cuts)
    for rank in before:
        with rank.divided.whole(merged(before)):
            state_dict = dict(rank.model.state_dict())
        assert_same(state_dict, dict(whole.state_dict()))
        state = rank.share.complete([other.share.state() for other in before])
        assert_same_optimizer(state, optimizer.state_dict())
        assert {n for n, t in rank.model.named_parameters() if not t.is_meta} <= rank.own, "for a moment only"
    after = ranks_of(whole, state, name, [2])
    assert_same_optimizer(after[0].share.complete([r.share.state() for r in after]), optimizer.state_dict())
    if name == "Adam":
        for rank in after:
            owned = {n for n, _ in rank.model.named_parameters()} & rank.own
            assert len(rank.optimizer.state) == len(owned), "the state of what it owns, and no other"


def test_put_together_again_it_trains_on_as_before() -> None:
    whole, optimizer = trained("Adam")
    ranks = ranks_of(whole, optimizer.state_dict(), "Adam", [1, 3])
    values = {name: value.detach().clone() for name, value in merged(ranks).items()}
    states = copy.deepcopy([rank.share.state() for rank in ranks])
    x = torch.randn(6, 3)
    optimizer.zero_grad()
    whole(x).square().sum().backward()
    optimizer.step()
    for rank in ranks:
        rank.divided.join(copy.deepcopy(values))
        rank.share.join(rank.model, copy.deepcopy(states))
        rank.optimizer.zero_grad()
        rank.model(x).square().sum().backward()
        rank.optimizer.step()
        assert_same(dict(rank.model.state_dict()), dict(whole.state_dict()))
        assert_same_optimizer(rank.optimizer.state_dict(), optimizer.state_dict())
        assert torch.equal(rank.model.scratch, torch.ones(2))


def test_what_is_lost_becomes_nan_and_not_noise() -> None:
    rank = ranks_of(Model(), None, "SGD", [2])[1]
    rank.divided.join({})
    assert rank.model.body[0].weight.isnan().all()
    assert rank.model.body[1].num_batches_tracked == 0
    assert not rank.model.body[3].weight.isnan().any()


def test_a_parameter_shared_within_a_block_stays_shared() -> None:
    model = nn.Module()
    model.one, model.two, model.other = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    model.two.weight = model.one.weight
    expected = dict(copy.deepcopy(model).state_dict())
    for mine in ([model.one, model.two], [model.other]):
        rank = copy.deepcopy(model)
        paths = {id(module): name for name, module in model.named_modules()}
        blocks = [rank.get_submodule(paths[id(module)]) for module in mine]
        divided = DividedModel(rank, own_names(rank, blocks, [rank.one, rank.two, rank.other], with_rest=False))
        assert rank.one.weight is rank.two.weight
        divided.join(expected)
        assert rank.one.weight is rank.two.weight
        assert_same(dict(rank.state_dict()), expected)


def test_what_comes_back_are_the_objects_that_went() -> None:
    """Who holds them, such as an ``nn.LSTM`` its weights, sees the values of then."""
    model = nn.Sequential(nn.LSTM(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = [*model.parameters(), *model.buffers()]
    x = torch.randn(5, 2, 3)
    trained = {name: t.detach() + 1 for name, t in (*model.named_parameters(), *model.named_buffers())}
    divided = DividedModel(model, {"2.weight", "2.bias"})
    assert sum(t.numel() for t in before[:4]) == 0, "they hold no memory"
    divided.join(trained)
    with torch.no_grad():
        model[2].weight.copy_(trained["2.weight"])
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == [id(t) for t in before]
    again = nn.LSTM(3, 4)
    again.load_state_dict({name.removeprefix("0."): t for name, t in trained.items() if name.startswith("0.")})
    assert torch.equal(model[0](x)[0], again(x)[0])


def test_an_optimizer_that_has_a_state_from_the_start_forgets_the_others() -> None:
    rank = ranks_of(Model(), None, "Adagrad", [2])[0]
    assert len(rank.optimizer.state) == len([n for n, _ in rank.model.named_parameters() if n in rank.own])
    assert rank.share.state().keys() == set(rank.share._indices)


def test_a_model_can_be_moved_without_what_is_on_the_meta_device() -> None:
    rank = ranks_of(Model(), None, "SGD", [2])[1]
    parameters = [id(p) for p in rank.model.parameters()]
    with pytest.raises(NotImplementedError, match="meta"):
        rank.model.to("cpu", torch.float64).cpu()
    with without_meta(rank.model):
        rank.model.cpu()
    assert [id(p) for p in rank.model.parameters()] == parameters


def meta_model() -> Model:
    with torch.device("meta"):
        return Model()


def test_a_rank_gets_values_that_it_has_never_had() -> None:
    whole, rank = Model(), meta_model()
    adopt(rank, tensors_of(whole, {"body.0.weight", "step"}), torch.device("cpu"))
    assert tensors_of(rank).keys() == {"body.0.weight", "step"}
    assert torch.equal(rank.body[0].weight, whole.body[0].weight)
    assert rank.body[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"'step' has shape \(\) here and \(2,\) on rank 0: build the same model"):
        adopt(rank, {"step": torch.ones(2)}, torch.device("cpu"))


def test_the_users_hook_gives_a_model_on_the_meta_device_its_values() -> None:
    model = meta_model()
    model.body[3].weight = model.body[2].weight = nn.Parameter(torch.empty(3, 3, device="meta"))  # tied
    expected = Model()

    def init_weights() -> None:
        tied = {id(model.body[3].weight)}
        for mine, other in zip(model.parameters(), expected.parameters(), strict=False):
            if id(mine) not in tied:
                mine.data.copy_(other.data) if mine.shape == other.shape else nn.init.ones_(mine)
        nn.init.ones_(model.body[3].weight)
        model.body[1].reset_running_stats()
        model.step.fill_(3)
        model.scratch = torch.ones(2)

    initialize(model, init_weights)
    assert on_meta(model) == []
    assert torch.equal(model.stem.weight, expected.stem.weight)
    assert model.body[3].weight is model.body[2].weight
    assert model.body[1].num_batches_tracked == 0


@pytest.mark.parametrize("left_out", ["stem.bias", "step", "body.1.running_var"])
def test_a_hook_that_leaves_something_out_is_an_error_that_names_it(left_out: str) -> None:
    model, expected = meta_model(), Model()
    values = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}

    def init_weights() -> None:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name != left_out:
                tensor.copy_(values[name])

    with pytest.raises(ValueError, match=rf"init_weights\(\) has left '{left_out}' without a value"):
        initialize(model, init_weights)


def test_values_of_a_file_are_taken_as_they_are() -> None:
    model, whole = meta_model(), Model()
    saved = {name: value.double() if name == "stem.weight" else value for name, value in whole.state_dict().items()}
    assert assign(model, saved) == set(saved)
    assert on_meta(model) == ["scratch"], "it is in no state_dict()"
    assert model.body[0].weight.data_ptr() == saved["body.0.weight"].data_ptr(), "not copied"
    assert model.stem.weight.dtype == torch.float32
    assert_same(dict(model.state_dict()), dict(whole.state_dict()))


def test_every_rank_may_read_buffers_and_frozen_parameters_outside_of_the_blocks() -> None:
    model = Model()
    model.stem.weight.requires_grad_(False)
    assert constant_names(model, [model.body]) == {"step", "scratch", "stem.weight"}
