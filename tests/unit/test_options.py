"""The values of param groups: read in a worker, written in the server."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from lightning_stale.parameter_server.options import read_options, write_options


def parameters(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def carried(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Read the options, and send them as a push does."""
    return msgpack.unpackb(msgpack.packb(read_options(optimizer)))


def test_all_plain_values_are_read() -> None:
    optimizer = torch.optim.AdamW(parameters(), lr=0.25, betas=(0.5, 0.75), weight_decay=0.125)
    (group,) = read_options(optimizer)
    assert {name: group[name] for name in ("lr", "betas", "weight_decay", "amsgrad", "foreach")} == {
        "lr": 0.25,
        "betas": [0.5, 0.75],
        "weight_decay": 0.125,
        "amsgrad": False,
        "foreach": None,
    }
    assert "params" not in group


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        ((torch.tensor(0.5), 0.75), [0.5, 0.75]),
        (7, 7),
        (True, True),
        (None, None),
        ("fast", "fast"),
        (np.float32(0.5), 0.5),  # what a schedule written with NumPy returns
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        ([1, (2, "x")], [1, [2, "x"]]),
    ],
    ids=repr,
)
def test_how_values_are_read(value: Any, read: Any) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["own"] = value
    (group,) = carried(optimizer)
    assert group["own"] == read
    assert type(group["own"]) is type(read)


@pytest.mark.parametrize("value", [torch.zeros(2), object(), {"a": 1}, len, [object()]])
def test_what_is_not_plain_stays(value: Any) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.param_groups[0]["own"] = value
    (group,) = carried(optimizer)
    assert "own" not in group
    assert group["lr"] == 0.1


def test_each_group_gets_its_own_values() -> None:
    first, second, third, fourth = parameters(4)
    worker = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.25, momentum=0.5)
    server = torch.optim.SGD([{"params": [third]}, {"params": [fourth]}], lr=9.0)
    write_options(server, carried(worker))
    assert [(group["lr"], group["momentum"]) for group in server.param_groups] == [(0.25, 0.5), (0.5, 0.5)]
    assert [group["params"] for group in server.param_groups] == [[third], [fourth]]


def test_tuples_stay_tuples() -> None:
    server = torch.optim.Adam(parameters(), betas=(0.1, 0.2))
    write_options(server, carried(torch.optim.Adam(parameters(), betas=(0.5, 0.75))))
    assert server.param_groups[0]["betas"] == (0.5, 0.75)


def test_a_tensor_is_filled_in_place() -> None:
    server = torch.optim.Adam(parameters(), lr=torch.tensor(0.5), foreach=False)
    held = server.param_groups[0]["lr"]
    write_options(server, carried(torch.optim.Adam(parameters(), lr=torch.tensor(0.125), foreach=False)))
    assert server.param_groups[0]["lr"] is held
    assert held.item() == 0.125


def test_how_to_compute_is_the_servers_own_choice() -> None:
    server = torch.optim.Adam(parameters(), foreach=True)
    worker = torch.optim.Adam(parameters(), fused=True, lr=0.5)
    worker.param_groups[0]["capturable"] = True
    write_options(server, carried(worker))
    group = server.param_groups[0]
    assert (group["foreach"], group["fused"], group["capturable"], group["lr"]) == (True, None, False, 0.5)


def test_a_scheduler_acts_on_the_server() -> None:
    worker = torch.optim.SGD(parameters(), lr=1.0, momentum=0.875)
    server = torch.optim.SGD(parameters(), lr=1.0, momentum=0.875)
    schedule = torch.optim.lr_scheduler.OneCycleLR(worker, max_lr=2.0, total_steps=10)
    for _ in range(4):
        worker.step()
        schedule.step()
        write_options(server, carried(worker))
        assert server.param_groups[0]["lr"] == worker.param_groups[0]["lr"]
        assert server.param_groups[0]["momentum"] == worker.param_groups[0]["momentum"]


def test_another_number_of_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        write_options(torch.optim.SGD(parameters(), lr=1.0), [{"lr": 1.0}, {"lr": 2.0}])
