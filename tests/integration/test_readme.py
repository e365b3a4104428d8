"""The longer examples of the README run, and do what it says of them."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from tests.integration.harness import ROOT
from tests.integration.models import TRAINER, assert_same, trainer, weights


def example(name: str) -> str:
    """Return the code under ``<!-- run: name -->``."""
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


class Dropping(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(**options: Any) -> L.Trainer:
    return L.Trainer(**{**TRAINER, **options})


def test_a_comparison_with_the_plain_trainer() -> None:
    """With shuffling and dropout; without the second seed, the runs differ (or else it would not be needed)."""
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    names = {"torch": torch, "DataLoader": DataLoader, "Model": Dropping, "data": data, "Trainer": quiet}
    names["seed_everything"] = L.seed_everything
    exec(example("compare"), dict(names))
    with pytest.raises(AssertionError):
        exec(example("compare").replace("seed_everything(1)  #", "#"), dict(names))


def test_hugging_faces_gpt2_in_blocks() -> None:
    names = {"torch": torch, "nn": nn, "F": F, "LightningModule": L.LightningModule}
    names["GPT2LMHeadModel"] = transformers.GPT2LMHeadModel
    exec(example("gpt2"), names)
    small = {"n_layer": 4, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    config = transformers.GPT2Config(
        **small,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    tokens = torch.randint(50, (40, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for strategy in ("auto", DSPStrategy(stages=2, staleness="bp")):
        torch.manual_seed(0)
        model = names["Text"](config)
        trainer(1, strategy, max_steps=8).fit(model, DataLoader(tokens, batch_size=5))
        results.append(weights(model))
    assert_same(*results)
