"""The entries of our own in a checkpoint: their names and fields are in users' files, and stay."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from lightning_stale import DSPStrategy, HPSGDStrategy, StaleSyncStrategy
from lightning_stale.strategies import checkpoint_entries
from lightning_stale.strategies.checkpoint_entries import AveragingEntry, EntryName, ServerEntry
from tests.integration.models import Regression, loader, trainer


def test_an_entry_is_written_where_there_are_optimizers() -> None:
    checkpoint: dict[str, Any] = {"optimizer_states": []}
    checkpoint_entries.write(checkpoint, "lightning_stale_hpsgd", lambda: {"outer": None})
    assert checkpoint["lightning_stale_hpsgd"] == {"outer": None}
    assert checkpoint_entries.read(checkpoint, "lightning_stale_hpsgd") == {"outer": None}
    assert checkpoint_entries.read(checkpoint, "lightning_stale") is None


def test_nobody_is_asked_for_the_entry_of_a_checkpoint_of_weights() -> None:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    checkpoint_entries.write(checkpoint, "lightning_stale", lambda: pytest.fail("it was asked for"))
    assert checkpoint.keys() == {"state_dict"}


def test_what_there_is_nothing_of_is_not_written() -> None:
    checkpoint: dict[str, Any] = {"optimizer_states": []}
    checkpoint_entries.write(checkpoint, "lightning_stale", lambda: None)
    assert checkpoint.keys() == {"optimizer_states"}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: StaleSyncStrategy(paradigm="ssp"), {"lightning_stale": ServerEntry}),
        (lambda: HPSGDStrategy(interval=2), {"lightning_stale_hpsgd": AveragingEntry}),
        (lambda: DSPStrategy(stages=2), {}),
    ],
    ids=["server", "averaging", "local"],
)
def test_the_entries_of_real_runs_have_the_fields_that_are_described(
    make: Any, fields: dict[str, Any], tmp_path: Any
) -> None:
    t = trainer(1, make(), max_steps=2)
    t.fit(Regression(), loader())
    t.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    names: tuple[EntryName, ...] = get_args(EntryName)
    found = {name: checkpoint[name] for name in names if name in checkpoint}
    assert found.keys() == fields.keys()
    for name, entry in found.items():
        amid_an_epoch_on_demand = {"data"}
        assert entry.keys() | amid_an_epoch_on_demand == fields[name].__annotations__.keys()
