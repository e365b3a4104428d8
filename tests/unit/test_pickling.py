"""Optimizers that are sent to the server continue there bit for bit, whatever they are."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stale.parameter_server.pickling import (
    OptimizerPicklingError,
    compute_on_cpu,
    dump_optimizers,
    load_optimizers,
)

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.1, "momentum": 0.9, "fused": True}],
    "Adam": [{"lr": 0.01}, {"amsgrad": True}, {"lr": torch.tensor(0.01)}, {"foreach": True}, {"fused": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "Muon": [{"lr": 0.01}],
}
"""Of torch's optimizers, where the default ones are not enough."""

NOT_SUPPORTED = {
    "Optimizer",  # the base class
    "LBFGS",  # several gradients per step; refused by check_optimizers
    "SparseAdam",  # for sparse gradients; refused by check_model
}
CASES = [
    (name, options)
    for name in sorted(vars(torch.optim))
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), Optimizer)
    and name not in NOT_SUPPORTED
    for options in OPTIONS.get(name, [{}])
]

SHAPES = [(4, 3), (3, 5), (6,), ()]


def make_parameters(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def copies(parameters: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]


def take_steps(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], seed: int, steps: int = 3) -> None:
    """Take ``steps`` of each of the optimizers with gradients that depend on ``seed`` only."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def carry(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> tuple[list[Optimizer], list[Any]]:
    """Return the optimizers as they arrive, and the tensors there."""
    there = copies(parameters)
    return load_optimizers(dump_optimizers(optimizers, parameters), there), there


def assert_continue_identically(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> list[Optimizer]:
    """Send the optimizers, step here and there, and compare; return those there."""
    loaded, there = carry(optimizers, parameters)
    start = [parameter.detach().clone() for parameter in parameters]
    take_steps(optimizers, parameters, seed=2)
    assert all(torch.equal(p, s) for p, s in zip(there, start, strict=True)), "a step here has changed weights there"
    assert any(not torch.equal(p, s) for p, s in zip(parameters, start, strict=True)), "the steps did nothing"
    take_steps(loaded, there, seed=2)
    for here, remote in zip(parameters, there, strict=True):
        assert torch.equal(here, remote)
    for here, remote in zip(optimizers, loaded, strict=True):
        assert type(here).__qualname__ == type(remote).__qualname__
        torch.testing.assert_close(remote.state_dict(), here.state_dict(), rtol=0.0, atol=0.0)
    return loaded


def test_all_optimizers_of_torch_are_tried() -> None:
    assert {name for name, _ in CASES} >= {"ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "NAdam", "SGD"}
    assert {name for name, _ in CASES} >= OPTIONS.keys()


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_optimizers_of_torch_continue_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    parameters = make_parameters(SHAPES[:2] if name == "Muon" else SHAPES)
    optimizer = getattr(torch.optim, name)(parameters, **options)
    take_steps([optimizer], parameters, seed=0)
    assert_continue_identically([optimizer], parameters)


def test_a_fresh_optimizer_starts_bit_for_bit() -> None:
    parameters = make_parameters()
    assert_continue_identically([torch.optim.Adagrad(parameters, initial_accumulator_value=0.5)], parameters)


def test_param_groups_keep_their_options_and_order() -> None:
    parameters = make_parameters()
    groups = [{"params": [parameters[2]], "lr": 0.5, "name": "head"}, {"params": [parameters[0], parameters[3]]}]
    loaded, there = carry([torch.optim.AdamW(groups, lr=0.25)], parameters)
    first, second = loaded[0].param_groups
    assert (first["lr"], first["name"], second["lr"]) == (0.5, "head", 0.25)
    assert [id(p) for p in first["params"]] == [id(there[2])]
    assert [id(p) for p in second["params"]] == [id(there[0]), id(there[3])]


def test_parameters_that_two_optimizers_share() -> None:
    parameters = make_parameters()
    optimizers = [
        torch.optim.SGD(parameters[:3], lr=0.1, momentum=0.9),
        torch.optim.Adam([parameters[3], parameters[1]], lr=0.01),
    ]
    take_steps(optimizers, parameters, seed=0)
    loaded = assert_continue_identically(optimizers, parameters)
    assert loaded[0].param_groups[0]["params"][1] is loaded[1].param_groups[0]["params"][1]


def test_parameters_do_not_travel() -> None:
    parameters = make_parameters([(1000, 100)])
    assert len(dump_optimizers([torch.optim.SGD(parameters, lr=0.1)], parameters)) < 10_000


class Averaging(torch.optim.SGD):
    """Keeps things beside state and param groups, as optimizers from the wild do."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.5)
        self.steps = 0
        self.first = self.param_groups[0]["params"][0]
        self.mean = torch.zeros_like(self.first)
        self.inner = torch.optim.Adam([self.first], lr=0.01)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.inner.step()
        self.steps += 1
        self.mean.lerp_(self.first, 1 / self.steps)
        self.first.add_(self.mean, alpha=0.1)


def test_a_custom_optimizer_with_attributes_tensors_and_an_optimizer_inside() -> None:
    parameters = make_parameters()
    optimizer = Averaging(parameters, lr=0.1)
    take_steps([optimizer], parameters, seed=0)
    (loaded,) = assert_continue_identically([optimizer], parameters)
    assert isinstance(loaded, Averaging)
    assert loaded.steps == optimizer.steps == 6
    assert loaded.first is loaded.param_groups[0]["params"][0]
    assert torch.equal(loaded.mean, optimizer.mean)
    assert loaded.mean is not optimizer.mean


def test_a_class_made_in_a_function_travels_by_value() -> None:
    scale = 0.5

    class Local(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=scale)

    parameters = make_parameters()
    assert_continue_identically([Local(parameters, lr=1.0)], parameters)


def test_a_class_of_the_users_script_loads_in_a_process_that_does_not_have_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        """
import sys, torch
from pathlib import Path
from lightning_stale.parameter_server.pickling import dump_optimizers

class Mine(torch.optim.SGD):
    def answer(self):
        return 42

parameters = [torch.nn.Parameter(torch.ones(2))]
Path("optimizer").write_bytes(dump_optimizers([Mine(parameters, lr=0.1)], parameters))
"""
    )
    command = [sys.executable, "-X", "lightning_stale_server", "script.py"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, env=environment)
    (optimizer,) = load_optimizers((tmp_path / "optimizer").read_bytes(), make_parameters([(2,)]))
    assert optimizer.answer() == 42  # type: ignore[attr-defined]
    assert type(optimizer).__module__ == "__main__"


def test_a_scheduler_and_hooks_stay_in_the_worker() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls: list[str] = []
    lock = threading.Lock()  # cannot be pickled, and need not

    def hook(*_: Any) -> None:
        with lock:
            calls.append("step")

    optimizer.register_step_pre_hook(hook)
    optimizer.register_step_post_hook(hook)
    take_steps([optimizer], parameters, seed=0, steps=2)
    scheduler.step()
    loaded, there = carry([optimizer], parameters)
    assert "step" not in vars(loaded[0])
    assert loaded[0].param_groups[0]["lr"] == 0.5
    before = list(calls)
    take_steps(loaded, there, seed=3)
    assert calls == before
    take_steps([optimizer], parameters, seed=3)
    assert len(calls) > len(before)
    for here, remote in zip(parameters, there, strict=True):
        assert torch.equal(here, remote)


def test_dumping_changes_nothing() -> None:
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters)
    take_steps([optimizer], parameters, seed=0)
    before = {name: id(value) for name, value in vars(optimizer).items()}
    dump_optimizers([optimizer], parameters)
    assert {name: id(value) for name, value in vars(optimizer).items()} == before


@pytest.mark.parametrize("where", ["attribute", "group", "state"])
def test_what_cannot_be_pickled_names_the_optimizer_and_the_cause(where: str) -> None:
    parameters = make_parameters()
    optimizers = [torch.optim.SGD(parameters, lr=0.1), torch.optim.Adagrad(parameters)]
    lock = threading.Lock()
    if where == "attribute":
        optimizers[1].lock = lock  # type: ignore[attr-defined]
    elif where == "group":
        optimizers[1].param_groups[0]["lock"] = lock
    else:
        optimizers[1].state[parameters[0]]["lock"] = lock
    with pytest.raises(
        OptimizerPicklingError, match="the optimizer Adagrad cannot be sent to the parameter server"
    ) as e:
        dump_optimizers(optimizers, parameters)
    assert "lock" in str(e.value)
    assert "keep locks, files and loggers out of it" in str(e.value)


def test_a_failing_reduction_is_named_too() -> None:
    class Stubborn(torch.optim.SGD):
        pass

    class Secret:
        def __reduce__(self) -> Any:
            raise RuntimeError("a secret does not travel")

    parameters = make_parameters()
    optimizer = Stubborn(parameters, lr=0.1)
    optimizer.secret = Secret()  # type: ignore[attr-defined]
    with pytest.raises(OptimizerPicklingError, match=r"Stubborn cannot be sent .*: a secret does not travel"):
        dump_optimizers([optimizer], parameters)


def test_the_memory_of_the_state_travels_beside_the_bytes_and_is_not_copied() -> None:
    parameters = make_parameters([(100, 50), (8, 3, 4, 4)])
    parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
    optimizers = [torch.optim.Adam(parameters[:1]), Averaging(parameters[1:], lr=0.1)]
    take_steps(optimizers, parameters, seed=0)
    optimizers[1].again = optimizers[1].mean  # type: ignore[attr-defined]
    optimizers[1].every_second = torch.arange(10.0)[::2]  # type: ignore[attr-defined]
    buffers: list[Tensor] = []
    data = dump_optimizers(optimizers, parameters, buffers)
    assert len(data) < 10_000
    pointers = {buffer.data_ptr() for buffer in buffers}
    state = [value for optimizer in optimizers for entry in optimizer.state.values() for value in entry.values()]
    tensors = [value for value in state if isinstance(value, Tensor)]
    assert len(tensors) == 4
    assert all(tensor.data_ptr() in pointers for tensor in tensors)
    there = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    first, second = load_optimizers(data, there, [buffer.clone() for buffer in buffers])
    assert second.again is second.mean  # type: ignore[attr-defined]
    assert second.every_second.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]  # type: ignore[attr-defined]
    take_steps(optimizers, parameters, seed=2)
    take_steps([first, second], there, seed=2)
    for here, remote in zip(parameters, there, strict=True):
        assert torch.equal(here, remote)
        assert here.stride() == remote.stride()


def test_capturable_is_switched_off() -> None:
    first, second = torch.optim.Adam(make_parameters()), torch.optim.SGD(make_parameters(), lr=0.1)
    first.param_groups[0]["capturable"] = True
    compute_on_cpu([first, second])
    assert first.param_groups[0]["capturable"] is False
    assert "capturable" not in second.param_groups[0]


def test_no_optimizers() -> None:
    assert load_optimizers(dump_optimizers([], []), []) == []
    assert isinstance(pickle.loads(dump_optimizers([], [])), list)
