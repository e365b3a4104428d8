"""``torch.compile`` of the module that is cut compiles its blocks, and not the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_stale import DSPStrategy
from lightning_stale.private import of_lightning
from tests.integration.models import Regression, assert_same, loader, trainer, weights

graphs: list[list[Any]] = []


def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


class Quiet(Regression):
    """``self.log`` cannot be compiled with a whole LightningModule, under whatever strategy."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def fit(prepare: Callable[[Any], Any], strategy: Any) -> Quiet:
    model = Quiet()
    prepared = prepare(model)
    trainer(1, strategy, max_steps=6).fit(model if prepared is None else prepared, loader())
    return model


def wrap(model: Any) -> None:
    model.net = torch.compile(model.net, backend=backend)


def wrap_fully(model: Any) -> None:
    model.net = torch.compile(model.net, backend=backend, fullgraph=True)


def in_place(model: Any) -> None:
    model.net.compile(backend=backend)


def whole(model: Any) -> Any:
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("prepare", [wrap, wrap_fully, in_place, whole])
@pytest.mark.parametrize("split", [[1], ["1"], "time"], ids=str)
def test_each_block_is_compiled_as_its_module_is(prepare: Any, split: Any) -> None:
    plain = fit(lambda model: None, "auto")
    graphs.clear()
    cut = fit(prepare, DSPStrategy(stages=2, staleness="bp", split=split))
    for one, other in zip(plain.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)
    blocks = [targets for targets in graphs if torch._C._nn.linear in targets]
    assert [targets.count(torch._C._nn.linear) for targets in blocks] == [1, 1], "two blocks, one layer in each"


def test_what_is_not_compiled_stays_so() -> None:
    fit(lambda model: None, DSPStrategy(stages=2))
    assert graphs == []


def test_the_names_in_a_checkpoint_are_those_of_the_model_as_it_was_given() -> None:
    """The wrapper stays where it is: what is saved loads into the same model under any strategy."""
    cut = fit(wrap, DSPStrategy(stages=2))
    assert set(weights(cut)) == {f"net._orig_mod.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    seen: list[list[str]] = []

    class Watching(Quiet):
        def on_train_epoch_end(self) -> None:
            seen.append(list(self.trainer.strategy.lightning_module_state_dict()))

    model = Watching()
    wrap(model)
    trainer(1, DSPStrategy(stages=2), max_steps=3).fit(model, loader())
    assert seen == [list(weights(cut))]


def test_a_model_is_compiled_as_before_after_fit() -> None:
    model = Quiet()
    in_place(model)
    call = model.net._compiled_call_impl
    trainer(1, DSPStrategy(stages=2), max_steps=2).fit(model, loader())
    assert model.net._compiled_call_impl is call
    assert "forward" not in vars(model.net)
    wrapped = Quiet()
    wrap(wrapped)
    forward = vars(wrapped.net)["forward"]
    trainer(1, DSPStrategy(stages=2), max_steps=2).fit(wrapped, loader())
    assert vars(wrapped.net)["forward"] is forward


def test_a_recomputed_compiled_block_trains_as_one_that_is_not(tmp_path: Any) -> None:
    for recompute in (True, False):
        results = [
            weights(fit(prepare, DSPStrategy(stages=2, staleness=(2, 0), recompute=recompute)))
            for prepare in (lambda model: None, in_place)
        ]
        assert_same(*results)


@pytest.mark.parametrize("compiled", [True, False])
def test_internals_find_the_compiler(compiled: bool) -> None:
    """The same for all three ways; it compiles with the same backend."""
    layer = nn.Sequential(nn.Linear(3, 3))
    assert of_lightning.compiler(layer) is None
    if compiled:
        layer.compile(backend=backend)
        found = of_lightning.compiler(layer)
    else:
        found = of_lightning.compiler(torch.compile(layer, backend=backend))
    assert found is not None
    assert found(lambda x: x.sin() + 1)(torch.ones(2)).shape == (2,)
    assert len(graphs) == 1
