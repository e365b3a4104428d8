"""One block: what it keeps, what a recompute repeats, and what features may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from lightning_stale import DSPStrategy
from lightning_stale.pipeline.block import Block
from lightning_stale.pipeline.pipeline import Pipeline
from lightning_stale.pipeline.stage import Stage
from tests.integration.models import assert_same, trainer, weights
from tests.unit.pipeline.networks import Chain, batches


def run(stage: Stage, data: list[Any], gradient: Callable[[int], Any], update: Callable[[], None]) -> list[Any]:
    """Run a stage alone through ``data`` and drain it; return the gradients of its inputs."""
    returned = []
    for n, features in enumerate(data):
        stage.forward(n, features if stage.first else tree_map(requiring, features))
        if n >= stage.staleness:
            returned.append(stage.backward(n - stage.staleness, gradient(n - stage.staleness)))
            update()
    for j in stage.pending:
        returned.append(stage.backward(j, gradient(j)))
        update()
    return returned


def requiring(value: Any) -> Any:
    """As a stage before has sent it, whose parameters are trained."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def rows(n: int, width: int = 4, size: int = 5) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(n))


# --- what is kept -----------------------------------------------------------------------------------------------------


def alive_while_pending(m: int, recompute: bool) -> tuple[int, int]:
    """Return (saved tensors, features) that stage 0 of staleness ``m`` holds when its pipeline is full."""
    alive = [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # the result of a layer would keep its own graph alive
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    block = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())))
    stage = Stage(Block(block), m, recompute=recompute, first=True)
    with saved_tensors_hooks(Held, lambda held: held.tensor):
        for n in range(m + 3):
            stage.forward(n, (rows(n),))
            if n >= m:
                stage.backward(n - m, [rows(n)])
        return alive[0], sum(pending.inputs[0].numel() for pending in stage._pending.values()) // rows(0).numel()


def test_recompute_keeps_inputs_and_no_graphs() -> None:
    for m in (1, 2, 6):
        saved, inputs = alive_while_pending(m, recompute=True)
        assert (saved, inputs) == (0, m)


def test_without_recompute_every_batch_keeps_its_graph() -> None:
    graph = alive_while_pending(1, recompute=False)[0]
    assert graph >= 8, "each of eight layers saves at least one tensor"
    assert alive_while_pending(6, recompute=False)[0] == 6 * graph


@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_is_kept_after_the_last_backward(recompute: bool) -> None:
    stage = Stage(Block(nn.Linear(4, 4)), 3, recompute=recompute)
    run(stage, [(rows(n),) for n in range(7)], lambda n: [rows(n)], lambda: None)
    assert stage.pending == []


def test_no_graph_reaches_over_a_cut() -> None:
    for recompute in (True, False):
        stage = Stage(Block(nn.Linear(4, 4)), 1, recompute=recompute)
        (out,) = stage.forward(0, (rows(0).requires_grad_(),))
        assert out.grad_fn is None
        assert out.requires_grad, "the next stage is to send a gradient back"
    last = Stage(Block(nn.Linear(4, 4)), 0, last=True)
    assert last.forward(0, (rows(0),))[0].requires_grad, "the loss is made of it"


# --- which weights ----------------------------------------------------------------------------------------------------


def test_recompute_uses_the_weights_of_now_and_kept_graphs_those_of_the_forward() -> None:
    """``z = w h`` with ``d = 1``: the gradient of ``h`` is the ``w`` that the backward has seen."""
    for recompute, seen in ((True, [1.0, 2.0, 3.0, 4.0]), (False, [1.0, 1.0, 1.0, 2.0])):
        block = nn.Linear(1, 1, bias=False)
        nn.init.ones_(block.weight)
        stage = Stage(Block(block), 2, recompute=recompute)

        def update(block: nn.Linear = block) -> None:
            assert block.weight.grad is not None
            assert block.weight.grad.item() == 7.0
            block.weight.grad = None
            with torch.no_grad():
                block.weight += 1  # in place, under the graphs that are kept

        data = [(torch.full((1, 1), 7.0),) for _ in range(4)]
        returned = run(stage, data, lambda n: [torch.ones(1, 1)], update)
        assert [float(gradients[0]) for gradients in returned] == seen
        assert block.weight.item() == 5.0


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_accumulate_in_the_parameters(recompute: bool) -> None:
    block = nn.Linear(1, 1, bias=False)
    stage = Stage(Block(block), 1, recompute=recompute)
    run(stage, [(torch.full((1, 1), 2.0),), (torch.full((1, 1), 3.0),)], lambda n: [torch.ones(1, 1)], lambda: None)
    assert block.weight.grad is not None
    assert block.weight.grad.item() == 5.0


@pytest.mark.parametrize("recompute", [True, False])
def test_frozen_parameters_get_no_gradient(recompute: bool) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[0].requires_grad_(False)
    stage = Stage(Block(block), 1, recompute=recompute)
    returned = run(stage, [(rows(n),) for n in range(3)], lambda n: [rows(n)], lambda: None)
    assert block[0].weight.grad is None
    assert block[1].weight.grad is not None
    assert all(gradients[0] is not None for gradients in returned)


# --- batch norm, dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("recompute", [True, False])
def test_batch_norm_counts_every_batch_once_when_it_goes_backward(m: int, recompute: bool) -> None:
    block, alone = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    stage = Stage(Block(block), m, recompute=recompute)
    counts = []
    for n in range(6):
        stage.forward(n, (rows(n),))
        if n >= m:
            stage.backward(n - m, [rows(n)])
        counts.append(int(block.num_batches_tracked))
    for j in stage.pending:
        stage.backward(j, [rows(j)])
    if recompute:
        assert counts == [max(0, n + 1 - m) for n in range(6)]
    for n in range(6):
        alone(rows(n))
    assert int(block.num_batches_tracked) == 6
    assert torch.equal(block.running_mean, alone.running_mean)
    assert torch.equal(block.running_var, alone.running_var)


def test_batch_norm_in_eval_mode_is_left_alone() -> None:
    block = nn.BatchNorm1d(4).eval()
    before = weights(block)
    stage = Stage(Block(block), 2)
    run(stage, [(rows(n),) for n in range(4)], lambda n: [rows(n)], lambda: None)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert not block.training


def test_a_buffer_that_starts_to_change_later_is_an_error_with_the_cure() -> None:
    class Counting(nn.Module):
        counts = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.counts:
                self.count += 1
            return x

    block = Counting()
    stage = Stage(Block(block), 2)
    stage.forward(0, (rows(0),))
    block.counts = True
    with pytest.raises(RuntimeError, match=r"Counting changed its buffer 'count'.*DSPStrategy\(recompute=False\)"):
        stage.forward(1, (rows(1),))


def test_batch_norm_may_be_frozen_and_trained_later() -> None:
    block, alone = nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4).eval()
    stage = Stage(Block(block), 1)
    for n in range(6):
        block.train(n >= 3)
        stage.forward(n, (rows(n),))
        stage.backward(n, [rows(n)])
        alone.train(n >= 3)
        alone(rows(n))
    assert_same(weights(alone), weights(block))


def test_batch_norm_that_learns_nothing_from_the_first_batch_still_counts_once() -> None:
    """Zeros leave a running mean of zero as it is, which looks as if this buffer never changed."""
    block, alone = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    stage = Stage(Block(block), 1)
    for n in range(4):
        stage.forward(n, (rows(n) * min(n, 1),))
        stage.backward(n, [rows(n)])
        alone(rows(n) * min(n, 1))
    assert_same(weights(alone), weights(block))


def test_batch_norm_in_a_layer_that_the_first_batch_drops_counts_what_it_sees() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor, dropped: bool) -> Tensor:
            return x if dropped else self.norm(x)

    block, alone = Dropped(), Dropped()
    stage = Stage(Block(block), 1)
    for n in range(4):
        stage.forward(n, (requiring(rows(n)), n in (0, 2)))
        if n > 0:
            stage.backward(n - 1, [rows(n - 1)])
        alone(rows(n), n in (0, 2))
    stage.backward(3, [rows(3)])
    assert int(block.norm.num_batches_tracked) == 2
    assert_same(weights(alone), weights(block))


def test_buffers_are_compared_in_the_first_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison waits for the GPU."""
    compared: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(0) or equal(a, b))
    stage = Stage(Block(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), 1)
    counts = []
    for n in range(4):
        stage.forward(n, (rows(n),))
        stage.backward(n, [rows(n)])
        counts.append(len(compared))
    assert counts[0] > 0
    assert len(set(counts)) == 1


@pytest.mark.parametrize("recompute", [True, False])
def test_the_backward_sees_the_dropout_mask_of_the_forward(recompute: bool) -> None:
    torch.manual_seed(0)
    stage = Stage(Block(nn.Dropout(0.5)), 2, recompute=recompute)
    ones, kept = torch.ones(6, 6), []
    returned = []
    for n in range(5):
        kept.append(stage.forward(n, (requiring(ones),))[0].detach())
        if n >= 2:
            returned.append(stage.backward(n - 2, [ones])[0])
    for forward, gradient in zip(kept, returned, strict=False):
        assert gradient is not None
        assert torch.equal(forward, gradient), "both are the mask, times 2"
    assert len({tuple(mask.flatten().tolist()) for mask in kept}) == 5, "every batch has a mask of its own"


def test_replaying_a_mask_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    stage = Stage(Block(nn.Dropout(0.5)), 1)
    stage.forward(0, (requiring(torch.ones(3, 3)),))
    before = torch.get_rng_state()
    stage.backward(0, [torch.ones(3, 3)])
    assert torch.equal(before, torch.get_rng_state())


# --- in-place operations ----------------------------------------------------------------------------------------------


def test_evaluation_leaves_the_tensors_of_the_loader_alone() -> None:
    """They may be those of the data set, which the other stages read too."""
    data = rows(0) - 1
    before = data.clone()
    (result,) = Stage(Block(nn.ReLU(inplace=True)), 2, first=True).evaluate((data,))
    assert torch.equal(data, before)
    assert torch.equal(result, before.relu())


@pytest.mark.parametrize("m", [0, 1, 2])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_leading_in_place_relu_changes_no_kept_input(m: int, recompute: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    data = [rows(n) for n in range(4)]
    stage = Stage(Block(block), m, recompute=recompute)
    returned = run(stage, [(x,) for x in data], lambda n: [rows(10 + n)], lambda: None)
    for n, (gradient,) in enumerate(returned):
        assert torch.equal(data[n], rows(n)), "what the stage was given is untouched"
        x = rows(n).requires_grad_()
        (expected,) = torch.autograd.grad(block[1](torch.relu(x)), x, rows(10 + n))
        assert torch.equal(gradient, expected)


def test_an_input_that_is_changed_only_later_is_an_error() -> None:
    class Late(nn.Module):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if self.late else x * 2

    block = Late()
    stage = Stage(Block(block), 1)
    stage.forward(0, (rows(0),))
    block.late = True
    with pytest.raises(RuntimeError, match="always or never"):
        stage.forward(1, (rows(1),))


def test_features_do_not_alias_weights_that_are_updated_in_place() -> None:
    """A block that returns its own parameter sends its value of now; the neighbour's copy must not follow."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.weight, self.weight.view(1, 3)

    block = Table()
    stage = Stage(Block(block, spreads=True), 1)
    _, sent = stage.forward(0, (rows(0, width=3),))
    with torch.no_grad():
        block.weight += 1
    assert torch.equal(sent, torch.zeros(1, 3))


# --- features ---------------------------------------------------------------------------------------------------------


class Nest(nn.Module):
    """Takes and gives a dict with a tuple, integers, a number and a tensor that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, state: Any) -> Any:
        if isinstance(state, Tensor):
            state = {"pair": (state, state * 2), "index": torch.arange(len(state)), "none": None, "idle": state + 1}
            state["scale"] = 2.0
        a, b = state["pair"]
        a = torch.tanh(self.linear(a)) * state["scale"]
        return {**state, "pair": (a, b[state["index"]] + 1)}


class Unnest(nn.Module):
    def forward(self, state: Any) -> Tensor:
        assert state["index"].dtype == torch.int64
        assert state["scale"] == 2.0
        assert state["none"] is None
        a, b = state["pair"]
        return a + b


@pytest.mark.parametrize("m", [(0, 0, 0), (4, 2, 0)])
@pytest.mark.parametrize("recompute", [True, False])
def test_nested_features_integers_and_values_without_gradient(m: tuple[int, ...], recompute: bool) -> None:
    torch.manual_seed(0)
    layers = [Nest(), Nest(), Unnest()]
    stages = [
        Stage(Block(layer), m[k], recompute=recompute, first=k == 0, last=k == 2) for k, layer in enumerate(layers)
    ]
    pipeline = Pipeline(stages)
    sizes = (5, 5, 3, 5, 1, 2)
    for n, size in enumerate(sizes):
        out = pipeline.forward((rows(n, size=size),))
        assert out is not None
        out[0].square().sum().backward()
        pipeline.backward()
    pipeline.drain(lambda: None)
    assert not pipeline.behind
    got = [parameter.grad for layer in layers for parameter in layer.parameters()]
    whole = nn.Sequential(*layers)
    whole.zero_grad()
    for n, size in enumerate(sizes):
        whole(rows(n, size=size)).square().sum().backward()
    for gradient, parameter in zip(got, whole.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_what_has_no_gradient_sends_none() -> None:
    stage = Stage(Block(Unnest()), 1)
    features = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, Nest()(rows(0)))
    stage.forward(0, (tree_map(requiring, features),))
    gradients = stage.backward(0, [torch.ones(5, 4)])
    assert [gradient is None for gradient in gradients] == [False, False, True], "idle is used by nobody"


def test_the_first_stage_asks_for_no_gradient_of_the_data() -> None:
    stage = Stage(Block(nn.Linear(4, 4)), 1, first=True)
    stage.forward(0, (rows(0),))
    assert stage.backward(0, [torch.ones(5, 4)]) == []


@pytest.mark.parametrize("recompute", [True, False])
def test_a_block_without_parameters_passes_gradients_on(recompute: bool) -> None:
    stage = Stage(Block(nn.Tanh()), 1, recompute=recompute)
    stage.forward(0, (requiring(rows(0)),))
    (gradient,) = stage.backward(0, [torch.ones(5, 4)])
    assert gradient is not None
    torch.testing.assert_close(gradient, 1 - torch.tanh(rows(0)).square())


# --- train and eval ---------------------------------------------------------------------------------------------------


def test_eval_is_never_left_on() -> None:
    class Watching(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(2, nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3)))
            self.modes: list[tuple[str, bool]] = []
            for layer in self.net:
                layer.register_forward_pre_hook(self.watch)

        def watch(self, module: nn.Module, _: Any) -> None:
            self.modes.append((self.trainer.state.stage.value, module.training))

    model = Watching()
    t = trainer(1, DSPStrategy(staleness=(4, 2, 0)), max_epochs=2, val_check_interval=4, num_sanity_val_steps=1)
    t.fit(model, batches(9), batches(2))
    training = [mode for stage, mode in model.modes if "train" in stage]
    evaluating = [mode for stage, mode in model.modes if "validat" in stage or "sanity" in stage]
    assert training
    assert evaluating
    assert not any(evaluating)
    assert all(training)
    assert all(module.training for module in model.modules())
    assert int(model.net[2][0].num_batches_tracked) == 18
