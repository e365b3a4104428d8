"""Buffers at a meeting point, with collectives that know what the other rank holds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_stale.strategies.buffers import agree_on_buffers


class Model(nn.Module):
    """Two batch norms, one without statistics, one instance norm, and buffers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm1d(2, track_running_stats=True))
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("table", torch.zeros(2, 2))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.register_buffer("absent", None)
        self.double = nn.BatchNorm1d(2).double()


def model_of(rank: int) -> Model:
    model = Model()
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(torch.randint(0, 8, buffer.shape, generator=generator))
    return model


Collectives = Callable[[list[Model]], list[Model]]


@pytest.fixture
def agree(monkeypatch: pytest.MonkeyPatch) -> Collectives:
    """Runs :func:`agree_on_buffers` on all ranks, one after the other: first to see what each sends, then for real."""

    def run(models: list[Model]) -> list[Model]:
        sent: list[list[Tensor]] = []

        def record(tensor: Tensor, src: int = 0) -> None:
            sent[-1].append(tensor.clone())

        monkeypatch.setattr(torch.distributed, "all_reduce", record)
        monkeypatch.setattr(torch.distributed, "broadcast", record)
        for model in models:
            sent.append([])
            agree_on_buffers(copy.deepcopy(model), len(models))
        shapes = [[(tensor.shape, tensor.dtype) for tensor in tensors] for tensors in sent]
        assert all(shape == shapes[0] for shape in shapes), "the ranks call different collectives"

        def all_reduce(tensor: Tensor) -> None:
            tensor.copy_(sum(tensors[position] for tensors in sent))
            advance()

        def broadcast(tensor: Tensor, src: int) -> None:
            tensor.copy_(sent[src][position])
            advance()

        def advance() -> None:
            nonlocal position
            position += 1

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
        for model in models:
            position = 0
            agree_on_buffers(model, len(models))
            assert position == len(sent[0])
        return models

    return run


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_statistics_are_averaged_and_other_buffers_are_those_of_rank_0(agree: Collectives, world_size: int) -> None:
    before = [{name: value.clone() for name, value in model_of(rank).named_buffers()} for rank in range(world_size)]
    after = [dict(model.named_buffers()) for model in agree([model_of(rank) for rank in range(world_size)])]
    assert {name for name in before[0] if is_statistic(name)} == {
        f"{module}.running_{kind}" for module in ("first", "second.0", "second.1", "double") for kind in ("mean", "var")
    }
    for name, value in before[0].items():
        expected = sum(values[name] for values in before) / world_size if is_statistic(name) else value
        for values in after:
            torch.testing.assert_close(values[name], expected, check_dtype=True)
            assert values[name].shape == value.shape


def test_buffers_keep_their_memory(agree: Collectives) -> None:
    """They may be tied to others, or be looked at through a view."""
    models = [model_of(0), model_of(1)]
    pointers = [buffer.data_ptr() for model in models for buffer in model.buffers()]
    agree(models)
    assert [buffer.data_ptr() for model in models for buffer in model.buffers()] == pointers


def test_parameters_are_left_alone(agree: Collectives) -> None:
    models = [model_of(0), model_of(1)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.fill_(3.0)
    agree(models)
    assert all((parameter == 3.0).all() for parameter in models[1].parameters())


def test_one_worker_has_nobody_to_agree_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a collective with one worker")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    monkeypatch.setattr(torch.distributed, "broadcast", fail)
    model = model_of(0)
    agree_on_buffers(model, world_size=1)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), model_of(0).buffers(), strict=True))
