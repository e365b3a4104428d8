"""Every Python snippet of the README and the pages runs, on its own, and the longer ones do what is said of them.

Where a page writes ``model``, ``datamodule``, ``Model`` and ``data``, which are the reader's own, it gets those of
here. Each runs on one CPU device, whatever it asks for; the five lines run as a script, with two workers.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_stale import DSPStrategy
from tests.integration.harness import ROOT, run_script
from tests.integration.models import TRAINER, assert_same, trainer, weights
from tests.pages import PAGES, Snippet, named, snippets

ALONE = [snippet for snippet in snippets("python") if snippet.name is None]
BATCHES = 8
BY_NAME = {"five lines", "compare", "gpt2", "replay"}
"""Those that have a test of their own below."""

_Trainer = L.Trainer


class Dropping(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(**options: Any) -> L.Trainer:
    """The Trainer of the snippets: it says nothing, and has one device."""
    return _Trainer(**{**options, **TRAINER, "devices": 1})


@pytest.fixture
def readers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a snippet finds where it begins."""
    monkeypatch.setattr(L, "Trainer", quiet)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    datamodule = L.LightningDataModule.from_datasets(data, batch_size=64 // BATCHES)
    return {"__name__": "page", "Model": Dropping, "model": Dropping(), "data": data, "datamodule": datamodule}


def run(snippet: Snippet, names: dict[str, Any], code: str | None = None) -> dict[str, Any]:
    """Run ``snippet``, or ``code`` in its place; an error shows its page and line."""
    names = dict(names)
    lines = "\n" * snippet.line + (snippet.code if code is None else code)
    exec(compile(lines, str(snippet.page), "exec"), names)
    return names


def test_no_snippet_is_left_out() -> None:
    assert {snippet.name for snippet in snippets() if snippet.name is not None} == BY_NAME
    assert {snippet.language for snippet in snippets()} == {"python", "bash", "yaml", "text"}
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert fences == 2 * len(snippets()), "a block that is indented, or whose fence has more than a language"


@pytest.mark.parametrize("snippet", ALONE, ids=str)
def test_a_snippet_runs_on_its_own(snippet: Snippet, readers_own: dict[str, Any]) -> None:
    run(snippet, readers_own)


SCRIPT = """
import functools
import lightning

options = dict(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
lightning.Trainer = functools.partial(lightning.Trainer, **options, enable_model_summary=False)
from tests.integration.models import Regression, regression_data

model = Regression()
datamodule = lightning.LightningDataModule.from_datasets(regression_data(32), batch_size=2)
"""


def test_the_five_lines_are_a_script_that_needs_no_other_change(tmp_path: Any) -> None:
    """No guard: each worker runs all of it."""
    five, *others = named("five lines")
    assert [ast.dump(ast.parse(one.code)) for one in others] == [ast.dump(ast.parse(five.code))] * len(others)
    code = five.code.replace('accelerator="auto", devices=4', 'accelerator="cpu", devices=2')
    assert code != five.code
    ended = run_script(SCRIPT + code, tmp_path)
    assert ended.returncode == 0, ended.output
    summaries = [ast.literal_eval(line) for line in ended.output.splitlines() if line.startswith("{'paradigm'")]
    assert len(summaries) == 2, ended.output
    for summary in summaries:
        assert [worker["pushes"] for worker in summary["workers"]] == [BATCHES, BATCHES]


def test_a_comparison_with_the_plain_trainer(readers_own: dict[str, Any]) -> None:
    """With shuffling and dropout; without the second seed, the runs differ (or else it would not be needed)."""
    (snippet,) = named("compare")
    run(snippet, readers_own)
    unseeded = snippet.code.replace("seed_everything(1)  #", "#")
    assert unseeded != snippet.code
    with pytest.raises(AssertionError):
        run(snippet, readers_own, unseeded)


def test_hugging_faces_gpt2_in_blocks(readers_own: dict[str, Any]) -> None:
    (snippet,) = named("gpt2")
    names = run(snippet, readers_own)
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


def test_a_recorded_fit_and_the_same_again(
    readers_own: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = named("replay")
    fit = run(snippet, readers_own)["fit"]
    assert_same(weights(fit(replay="run.record")), weights(fit(record=False)))  # one worker: always the same
    with pytest.raises(ValueError, match="no record of a run"):
        fit(replay=__file__)
