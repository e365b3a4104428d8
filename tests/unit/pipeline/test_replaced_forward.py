"""A copy of a module that is cut is a module like any other."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from lightning_stale.pipeline.replaced_forward import ReplacedForward
from tests.unit.pipeline.networks import Skips


def cut(model: nn.Module) -> nn.Module:
    def run(*args: Any) -> Any:
        raise RuntimeError("into the pipeline")

    model.forward = ReplacedForward(model, run)
    return model


def copies(model: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save({"net": model}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)["net"]
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved]


def test_copies_have_their_own_forward() -> None:
    x = torch.randn(4, 6)
    model = Skips()
    expected = model(x)
    outer = nn.Sequential(cut(model))
    for copied in (*copies(model), *(sequential[0] for sequential in copies(outer))):
        assert torch.equal(copied(x), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert copied(x).abs().sum() == 0, "its own weights"
    assert "ReplacedForward" in repr(type(model.forward))


def test_what_is_loaded_does_not_need_this_package() -> None:
    assert b"lightning_stale" not in pickle.dumps(cut(nn.Linear(2, 2)))
