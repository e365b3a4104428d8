"""Ranks that own parts of a model and its optimizer, side by side in one process, make up the whole again."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stale.pipeline.ownership import (
    OptimizerShare,
    complete_state_dict,
    constant_names,
    materialize,
    own_names,
    own_values,
    put_back,
    release_others,
)
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
        self.share = OptimizerShare(self.optimizer, names, self.own)
        release_others(self.model, self.own)
        if state is not None:
            self.share.load(state)


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
        assert set(own_values(rank.model, rank.own)) == rank.own
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
        everyone = [own_values(other.model, other.own) for other in before]
        assert_same(complete_state_dict(rank.model, everyone), dict(whole.state_dict()))
        state = rank.share.complete([other.share.state() for other in before])
        assert_same_optimizer(state, optimizer.state_dict())
        assert "scratch" not in complete_state_dict(rank.model, everyone), "not persistent"
    after = ranks_of(whole, state, name, [2])
    assert_same_optimizer(after[0].share.complete([r.share.state() for r in after]), optimizer.state_dict())
    if name == "Adam":
        for rank in after:
            owned = {n for n, _ in rank.model.named_parameters()} & rank.own
            assert len(rank.optimizer.state) == len(owned), "the state of what it owns, and no other"


def test_put_together_again_it_trains_on_as_before() -> None:
    whole, optimizer = trained("Adam")
    ranks = ranks_of(whole, optimizer.state_dict(), "Adam", [1, 3])
    values = {name: value for rank in ranks for name, value in own_values(rank.model, rank.own).items()}
    state = ranks[0].share.complete([rank.share.state() for rank in ranks])
    x = torch.randn(6, 3)
    optimizer.zero_grad()
    whole(x).square().sum().backward()
    optimizer.step()
    for rank in ranks:
        put_back(rank.model, values)
        rank.share.join(rank.model, copy.deepcopy(state))
        rank.optimizer.zero_grad()
        rank.model(x).square().sum().backward()
        rank.optimizer.step()
        assert_same(dict(rank.model.state_dict()), dict(whole.state_dict()))
        assert_same_optimizer(rank.optimizer.state_dict(), optimizer.state_dict())
        assert torch.equal(rank.model.scratch, torch.ones(2))


def test_what_is_lost_becomes_nan_and_not_noise() -> None:
    rank = ranks_of(Model(), None, "SGD", [2])[1]
    put_back(rank.model, {})
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
        release_others(rank, own_names(rank, blocks, [rank.one, rank.two, rank.other], with_rest=False))
        assert rank.one.weight is rank.two.weight
        put_back(rank, expected)
        assert rank.one.weight is rank.two.weight
        assert_same(dict(rank.state_dict()), expected)


def on_meta() -> Model:
    with torch.device("meta"):
        model = Model()
    model.step = torch.tensor(3)
    model.scratch = torch.ones(2)
    return model


def test_ranks_together_materialise_the_model_that_one_process_makes() -> None:
    whole = on_meta()
    torch.manual_seed(4)
    materialize(whole, set(whole.state_dict()), torch.device("cpu"))
    assert not any(p.is_meta for p in whole.parameters())
    assert torch.equal(whole.body[1].running_var, torch.ones(4))
    held: set[str] = set()
    for own in (
        {"body.0.weight", "body.0.bias"},
        {name for name in whole.state_dict() if not name.startswith("body.0")},
    ):
        rank = on_meta()
        torch.manual_seed(4)
        materialize(rank, own, torch.device("cpu"))
        in_memory = {name for name, t in rank.state_dict().items() if not t.is_meta}
        assert in_memory - {"step"} == own - {"step"}
        for name in in_memory:
            assert torch.equal(rank.state_dict()[name], whole.state_dict()[name]), name
        held |= in_memory
    assert held == set(whole.state_dict())


def test_tied_parameters_are_materialised_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3, device="meta"))
    model[1].weight = model[0].weight
    materialize(model, {"0.weight", "0.bias", "1.weight", "1.bias"}, torch.device("cpu"))
    assert model[0].weight is model[1].weight
    assert not model[0].weight.is_meta


def test_what_cannot_be_given_a_value_is_an_error_with_the_cure() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Bare())
    with pytest.raises(
        ValueError, match=r"1 \(Bare\) holds 'scale' on the meta device .*reset_parameters\(\).*define it"
    ):
        materialize(model, {"1.scale"}, torch.device("cpu"))


def test_every_rank_may_read_buffers_and_frozen_parameters_outside_of_the_blocks() -> None:
    model = Model()
    model.stem.weight.requires_grad_(False)
    assert constant_names(model, [model.body]) == {"step", "scratch", "stem.weight"}
