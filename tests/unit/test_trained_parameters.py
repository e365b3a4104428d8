"""What the optimizers have trained is what the model holds when fit ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_stale import DSPStrategy
from lightning_stale.strategies.trained_parameters import TrainedParameters
from tests.integration.models import trainer
from tests.unit.pipeline.networks import Chain, batches


def held(model: nn.Module) -> TrainedParameters:
    return TrainedParameters(model, [torch.optim.SGD(model.parameters(), lr=0.1)])


def test_a_parameter_in_whose_place_is_another_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    trained = held(model)
    trained.check()
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"^1\.weight is not the parameter any more that the optimizer has trained"):
        trained.check()


def test_so_is_a_plain_tensor() -> None:
    model = nn.Linear(2, 2)
    trained = held(model)
    del model._parameters["bias"]
    model.bias = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"^bias is not the parameter"):
        trained.check()


def test_what_was_deleted_pruned_or_given_other_memory_is_none_of_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    trained = held(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[1].weight.data = torch.zeros(2, 2)
    del model[2]
    trained.check()


def test_only_what_the_optimizer_trains_counts() -> None:
    model = nn.Linear(2, 2)
    trained = TrainedParameters(model, [torch.optim.SGD([model.weight], lr=0.1)])
    model.bias = nn.Parameter(torch.zeros(2))
    trained.check()


@pytest.mark.parametrize("strategy", ["hpsgd", DSPStrategy(stages=2)], ids=["hpsgd", "dsp"])
def test_a_strategy_looks_at_the_end_of_fit(strategy: Any) -> None:
    class Swaps(Chain):
        def on_train_batch_end(self, *_: Any) -> None:
            self.net[0][0].weight = nn.Parameter(self.net[0][0].weight.detach().clone())

    fit = trainer(1, strategy, max_steps=2).fit
    with pytest.raises(RuntimeError, match=r"net\.0\.0\.weight is not the parameter any more"):
        fit(Swaps(), batches(4))
