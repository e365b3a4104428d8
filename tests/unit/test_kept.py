"""What objects have gathered is as it was, in the same containers."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule
from torchmetrics import CatMetric, MeanMetric

from lightning_stale.strategies.kept import Kept


def test_containers_are_the_same_objects_with_what_was_in_them() -> None:
    inner = [1]
    owner = SimpleNamespace(
        outputs=inner, both={"outputs": inner, 3: deque([1])}, seen={1}, grouped=defaultdict(list), number=1, made=None
    )
    kept = Kept([owner])
    inner += [2, 3]
    owner.both["new"] = 1
    owner.both[3].append(2)
    owner.seen.add(2)
    owner.grouped["a"].append(1)
    owner.number, owner.made = 2, object()
    made = owner.made
    owner.outputs = [7]
    kept.restore()
    assert owner.outputs is owner.both["outputs"] is inner
    assert (inner, owner.both, owner.seen) == ([1], {"outputs": [1], 3: deque([1])}, {1})
    assert (owner.number, dict(owner.grouped), owner.grouped["b"]) == (1, {}, [])
    assert owner.made is made, "what is no plain value is left alone"


def test_tensors_and_metrics_are_as_they_were_and_parameters_as_they_are() -> None:
    model = LightningModule()
    model.layer = torch.nn.Linear(1, 1)
    model.mean, model.cat = MeanMetric(), CatMetric()
    model.total, model.same = torch.zeros(2), torch.ones(1)
    same = model.same
    with torch.inference_mode():
        model.inference = torch.zeros(1)
    model.mean.update(3.0)
    model.cat.update(3.0)
    kept = Kept(model.modules())
    with torch.inference_mode():
        model.mean.update(9.0)
        model.cat.update(9.0)
        model.inference += 1
    model.mean.compute()
    model.total += 1
    with torch.no_grad():
        model.layer.weight.fill_(5.0)
    model.eval()
    kept.restore()
    assert (float(model.mean.compute()), model.cat.compute().tolist()) == (3.0, 3.0)
    assert (model.total.tolist(), model.inference.tolist()) == ([0.0, 0.0], [0.0])
    assert model.same is same
    assert float(model.layer.weight.detach()) == 5.0
    assert not model.training, "modes are the loop's business"
    model.total += 1  # an ordinary tensor, and not one of inference mode
