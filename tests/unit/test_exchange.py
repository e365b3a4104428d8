"""A worker's optimizers while they push: with a client that only notes what it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn

from lightning_stale.strategies.clipping import clipping_with
from lightning_stale.strategies.updates.exchange import Exchange
from lightning_stale.strategies.updates.update import unique_parameters
from lightning_stale.transport.layout import Layout


class FakeClient:
    """Notes pushes with their gradients; its buffers are the client's."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        layout = Layout.of(parameters)
        self.buffer = torch.zeros(2 * layout.nbytes, dtype=torch.uint8)
        self.gradients = layout.views(self.buffer[: layout.nbytes])
        self.weights = layout.views(self.buffer[layout.nbytes :])
        for weight, parameter in zip(self.weights, parameters, strict=True):
            weight.copy_(parameter.detach())
        self.pushes: list[dict[str, Any]] = []
        self.changes: list[list[int]] = []
        self.refreshed = 0

    def push(
        self,
        optimizer: int,
        places: list[int],
        used: list[bool],
        options: Any,
        clip: Any,
        whole: bool,
        leases: Sequence[int],
        asks: bool,
        commits: bool,
    ) -> None:
        assert (leases, asks, commits) == ((), False, True), "nobody hands out batches"
        gradients = [self.gradients[p].clone() if u else None for p, u in zip(places, used, strict=True)]
        self.pushes.append({"optimizer": optimizer, "gradients": gradients, "options": options, "clip": clip})

    def tell_changes(self, places: list[int]) -> None:
        self.changes.append(places)

    def refresh(self) -> None:
        self.refreshed += 1


class Setup:
    """Two parameters, an optimizer over them, and their exchange."""

    def __init__(
        self,
        *,
        averages: bool = False,
        alone: bool = False,
        whole: bool = True,
        make: Callable[..., list[torch.optim.Optimizer]] | None = None,
    ) -> None:
        self.parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        self.optimizers = (make or (lambda p: [torch.optim.SGD(p, lr=0.5)]))(self.parameters)
        self.client = FakeClient(unique_parameters(self.optimizers))
        self.guarded = 0
        self.exchange = Exchange(
            self.client,  # type: ignore[arg-type]
            {id(parameter): f"layer{i}.weight" for i, parameter in enumerate(self.parameters)},
            self.optimizers,
            torch.device("cpu"),
            alone=alone,
            whole=whole,
            guard=self._guard,
        )
        self.precision = clipping_with(Precision(), self.exchange.note_clipping) if averages else Precision()

    def _guard(self, call: Callable[[], Any]) -> Any:
        self.guarded += 1
        return call()

    def backward(self, factor: float = 1.0, indices: Sequence[int] = (0, 1)) -> Tensor:
        loss = sum(factor * (index + 1) * self.parameters[index].sum() for index in indices)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss


def pushed(setup: Setup) -> list[float | None]:
    """Return the value of each gradient of the only push so far."""
    (push,) = setup.client.pushes
    return [None if gradient is None else gradient.unique().item() for gradient in push["gradients"]]


def test_a_step_is_a_push_of_the_gradients_and_options() -> None:
    setup = Setup()
    setup.backward(3.0)
    assert setup.optimizers[0].step() is None
    assert pushed(setup) == [3.0, 6.0]
    assert setup.client.pushes[0]["options"][0]["lr"] == 0.5
    assert setup.client.pushes[0]["clip"] is None
    assert setup.guarded == 1


def test_weights_are_not_stepped_here_but_are_the_clients() -> None:
    setup = Setup()
    setup.backward()
    setup.optimizers[0].step()
    assert all((parameter == 1.0).all() for parameter in setup.parameters)
    setup.client.weights[1].fill_(7.0)
    setup.exchange.spread()
    assert (setup.parameters[1] == 7.0).all()


def test_the_closure_runs_once_with_gradients_and_its_loss_is_returned() -> None:
    setup = Setup()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return setup.backward()

    with torch.no_grad():
        loss = setup.optimizers[0].step(closure)
    assert calls == [True]
    assert loss == 3.0 + 2.0 * 4
    assert pushed(setup) == [1.0, 2.0]


def test_gradients_accumulate_over_backwards_until_zeroed() -> None:
    setup = Setup()
    setup.backward(1.0)
    setup.backward(2.0)
    setup.optimizers[0].step()
    assert pushed(setup) == [3.0, 6.0]
    setup.client.pushes.clear()
    setup.optimizers[0].zero_grad()
    setup.backward(5.0)
    setup.optimizers[0].step()
    assert pushed(setup) == [5.0, 10.0]


def test_unused_parameters_are_marked() -> None:
    setup = Setup()
    setup.backward(indices=[1])
    setup.optimizers[0].step()
    assert pushed(setup) == [None, 2.0]


def test_without_any_gradient_nothing_is_pushed() -> None:
    setup = Setup()
    setup.optimizers[0].step()
    assert setup.client.pushes == []
    assert setup.guarded == 0


def test_gradients_that_were_changed_or_replaced_after_backward_are_pushed() -> None:
    setup = Setup()
    setup.backward()
    assert setup.parameters[0].grad is not None
    setup.parameters[0].grad.mul_(4.0)
    setup.parameters[1].grad = torch.full((2, 2), 9.0)
    setup.optimizers[0].step()
    assert pushed(setup) == [4.0, 9.0]


def test_each_optimizer_pushes_its_own_parameters() -> None:
    def make(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam([parameters[1]]), torch.optim.SGD(parameters, lr=0.1)]

    setup = Setup(make=make)
    assert [id(p) for p in unique_parameters(setup.optimizers)] == [id(p) for p in reversed(setup.parameters)]
    setup.backward()
    for optimizer in setup.optimizers:
        optimizer.step()
    assert [push["optimizer"] for push in setup.client.pushes] == [0, 1]
    values = [[gradient.unique().item() for gradient in push["gradients"]] for push in setup.client.pushes]
    assert values == [[2.0], [1.0, 2.0]]


def test_a_sparse_gradient_is_refused() -> None:
    setup = Setup()
    setup.parameters[1].grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(MisconfigurationException, match=r"layer1.weight has a sparse gradient") as error:
        setup.optimizers[0].step()
    assert "Embedding(sparse=False)" in str(error.value)
    assert setup.client.pushes == []


def test_a_param_group_added_during_fit_is_refused() -> None:
    setup = Setup()
    setup.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(MisconfigurationException, match="SGD had 2 parameters when fit started and has 3 now") as error:
        setup.optimizers[0].step()
    assert "configure_optimizers" in str(error.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "noted"),
    [(GradClipAlgorithmType.NORM, "norm"), (GradClipAlgorithmType.VALUE, "value"), ("norm", "norm")],
)
def test_a_paradigm_that_averages_leaves_clipping_to_the_server(wrapped: bool, algorithm: Any, noted: str) -> None:
    setup = Setup(averages=True)
    setup.backward(8.0)
    optimizer = LightningOptimizer(setup.optimizers[0]) if wrapped else setup.optimizers[0]
    setup.precision.clip_gradients(optimizer, 0.25, algorithm)  # type: ignore[arg-type]
    setup.optimizers[0].step()
    assert pushed(setup) == [8.0, 16.0]
    assert setup.client.pushes[0]["clip"] == (0.25, noted)
    setup.client.pushes.clear()
    setup.precision.clip_gradients(optimizer, 0.0, algorithm)  # type: ignore[arg-type]
    setup.optimizers[0].step()
    assert setup.client.pushes[0]["clip"] is None, "the clipping of the step before"


def test_other_paradigms_push_what_was_clipped_here() -> None:
    setup = Setup()
    setup.backward(8.0)
    setup.precision.clip_gradients(setup.optimizers[0], 0.25, GradClipAlgorithmType.VALUE)
    setup.optimizers[0].step()
    assert pushed(setup) == [0.25, 0.25]
    assert setup.client.pushes[0]["clip"] is None


def test_a_scheduler_made_before_does_not_warn_and_moves_the_pushed_options(recwarn: pytest.WarningsRecorder) -> None:
    schedulers = []

    def make(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5))
        return [optimizer]

    setup = Setup(make=make)
    for _ in range(3):
        setup.backward()
        setup.optimizers[0].step()
        schedulers[0].step()
    assert [push["options"][0]["lr"] for push in setup.client.pushes] == [1.0, 0.5, 0.25]
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_step_hooks_run_in_the_worker() -> None:
    setup = Setup()
    calls: list[str] = []
    setup.optimizers[0].register_step_pre_hook(lambda *_: calls.append("pre"))
    setup.optimizers[0].register_step_post_hook(lambda *_: calls.append("post"))
    setup.backward()
    setup.optimizers[0].step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("averages", [False, True])
def test_release_gives_everything_back(averages: bool) -> None:
    setup = Setup(averages=averages)
    setup.backward()
    setup.optimizers[0].step()
    setup.client.weights[0].fill_(7.0)
    setup.exchange.release()
    setup.client.buffer.zero_()
    assert (setup.parameters[0] == 7.0).all(), "the model still lives in the client's memory"
    assert all(parameter.grad is None for parameter in setup.parameters)
    setup.backward(2.0)
    setup.optimizers[0].step()
    assert (setup.parameters[0] == 7.0 - 0.5 * 2.0).all(), "the optimizer does not step by itself again"
    assert len(setup.client.pushes) == 1
    assert not setup.client.buffer.any(), "gradients still go to the client's memory"


def test_release_gives_a_scheduled_step_back() -> None:
    def make(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
        before.append(vars(optimizer)["step"])
        return [optimizer]

    before: list[Any] = []
    setup = Setup(make=make)
    assert vars(setup.optimizers[0])["step"] is not before[0]
    setup.exchange.release()
    assert vars(setup.optimizers[0])["step"] is before[0]


def in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(3.0)


def replaced(parameter: nn.Parameter) -> None:
    parameter.data = 3.0 * parameter.data


@pytest.mark.parametrize("change", [in_place, replaced])
def test_what_the_only_worker_does_to_its_weights_counts(change: Callable[[nn.Parameter], None]) -> None:
    setup = Setup(alone=True)
    change(setup.parameters[0])
    setup.parameters[0].sum().backward()
    setup.optimizers[0].step()
    assert torch.equal(setup.client.weights[0], torch.full((3,), 3.0))
    assert setup.client.changes == [[0]]
    setup.client.weights[0].fill_(7.0)  # the server takes its step
    setup.exchange.spread()
    assert torch.equal(setup.parameters[0], torch.full((3,), 7.0))


@pytest.mark.parametrize("change", [in_place, replaced])
def test_one_of_several_workers_is_told_once_that_its_change_is_lost(change: Callable[[nn.Parameter], None]) -> None:
    setup = Setup()
    change(setup.parameters[1])
    setup.parameters[0].sum().backward()
    with pytest.warns(UserWarning, match=r"layer1\.weight was changed outside of the optimizer"):
        setup.optimizers[0].step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(setup.parameters[1])
        setup.optimizers[0].step()
    setup.client.weights[1].fill_(7.0)
    setup.exchange.spread()
    assert torch.equal(setup.parameters[1], torch.full((2, 2), 7.0)), "a pull must reach the model all the same"


def test_weights_that_are_swapped_and_remembered_are_no_change() -> None:
    setup = Setup()
    in_place(setup.parameters[0])
    setup.exchange.remember()
    setup.parameters[0].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup.optimizers[0].step()


@pytest.mark.parametrize("whole", [True, False])
def test_a_graph_that_needs_the_weights_of_before_a_step_raises_as_with_a_plain_optimizer(whole: bool) -> None:
    setup = Setup(whole=whole)
    later = (setup.parameters[0] ** 2).sum()
    setup.backward()
    setup.optimizers[0].step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_a_graph_over_other_weights_than_those_of_the_step_lives_on_and_they_come_after_the_batch() -> None:
    def make(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([parameters[0]], lr=0.5), torch.optim.SGD([parameters[1]], lr=0.5)]

    setup = Setup(whole=False, make=make)
    later = (setup.parameters[1] ** 2).sum()
    setup.backward(indices=[0])
    setup.optimizers[0].step()
    later.backward()
    assert setup.client.refreshed == 0
    setup.exchange.after_batch()
    assert setup.client.refreshed == 1
    again = (setup.parameters[1] ** 2).sum()
    setup.exchange.after_batch()
    assert setup.client.refreshed == 1, "nothing has been pushed since"
    again.backward()


def test_automatic_optimization_pulls_once() -> None:
    setup = Setup()
    setup.backward()
    setup.optimizers[0].step()
    setup.exchange.after_batch()
    assert setup.client.refreshed == 0
