"""Which checkpoint a run goes on from: the newest of its own that is whole, whenever the last attempt has died."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stale.strategies import restart
from lightning_stale.strategies.restart import SavedCheckpoints

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "global_step": 3}


class Death(Exception):
    """What ends the process."""


def save(saved: SavedCheckpoints, path: Path, step: int, content: Any = CONTENT) -> None:
    with saved.saving(path, step, returns_early=False):
        torch.save(content, path)


def die(saved: SavedCheckpoints, path: Path, step: int, write: Callable[[], Any]) -> None:
    """Save, up to after what ``write`` writes."""
    with pytest.raises(Death), saved.saving(path, step, returns_early=False):
        _then_die(write)


def _then_die(write: Callable[[], Any]) -> None:
    write()
    raise Death


@pytest.fixture
def saved(tmp_path: Path) -> SavedCheckpoints:
    return SavedCheckpoints(tmp_path / "record.json", "1 module.Class")


def test_nothing_was_saved(saved: SavedCheckpoints, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "of-another-run.ckpt")
    assert saved.newest() is None


def test_the_newest_that_is_still_there(saved: SavedCheckpoints, tmp_path: Path) -> None:
    for step in range(4):
        save(saved, tmp_path / f"{step}.ckpt", step)
    assert saved.newest() == (str(tmp_path / "3.ckpt"), 3)
    (tmp_path / "3.ckpt").unlink()  # as ModelCheckpoint(save_top_k=...) does
    assert saved.newest() == (str(tmp_path / "2.ckpt"), 2)


def test_a_relative_path_is_found_from_elsewhere(
    saved: SavedCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(saved, Path("here.ckpt"), 1)
    monkeypatch.chdir("/")
    assert saved.newest() == (str(tmp_path / "here.ckpt"), 1)


@pytest.mark.parametrize("written", [0.0, 0.5, 0.99])
def test_one_that_was_half_written_is_not_taken(written: float, saved: SavedCheckpoints, tmp_path: Path) -> None:
    save(saved, tmp_path / "1.ckpt", 1)
    save(saved, tmp_path / "whole.ckpt", 9)
    data = (tmp_path / "whole.ckpt").read_bytes()
    die(saved, tmp_path / "2.ckpt", 2, lambda: (tmp_path / "2.ckpt").write_bytes(data[: int(written * len(data))]))
    (tmp_path / "whole.ckpt").unlink()
    assert saved.newest() == (str(tmp_path / "1.ckpt"), 1)


def test_one_with_a_hole_is_not_taken(saved: SavedCheckpoints, tmp_path: Path) -> None:
    """Its table of contents is there, and not what it tells of."""

    def write() -> None:
        torch.save(CONTENT, tmp_path / "1.ckpt")
        with (tmp_path / "1.ckpt").open("r+b") as file:
            file.seek(2000)
            file.write(bytes(500))

    die(saved, tmp_path / "1.ckpt", 1, write)
    assert saved.newest() is None


def test_one_that_was_there_and_not_noted_is_taken(saved: SavedCheckpoints, tmp_path: Path) -> None:
    """The process has died between the two."""
    save(saved, tmp_path / "1.ckpt", 1)
    die(saved, tmp_path / "2.ckpt", 2, lambda: torch.save(CONTENT, tmp_path / "2.ckpt"))
    assert saved.newest() == (str(tmp_path / "2.ckpt"), 2)


@pytest.mark.parametrize("written", [0.5, 1.0])
def test_one_that_replaces_another_of_its_name(written: float, saved: SavedCheckpoints, tmp_path: Path) -> None:
    """``last.ckpt``: half of it over the one before leaves neither; the whole of it is the new one."""
    last = tmp_path / "last.ckpt"
    save(saved, tmp_path / "0.ckpt", 0)
    save(saved, last, 1)
    data = last.read_bytes()
    die(saved, last, 2, lambda: last.write_bytes(data[: int(written * len(data))]))
    assert saved.newest() == ((str(last), 2) if written == 1 else (str(tmp_path / "0.ckpt"), 0))


def test_one_that_was_about_to_be_replaced_is_as_old_as_it_is(saved: SavedCheckpoints, tmp_path: Path) -> None:
    save(saved, tmp_path / "last.ckpt", 1)
    die(saved, tmp_path / "last.ckpt", 2, lambda: None)
    assert saved.newest() == (str(tmp_path / "last.ckpt"), 1)
    save(saved, tmp_path / "2.ckpt", 2)
    die(saved, tmp_path / "last.ckpt", 3, lambda: None)
    assert saved.newest() == (str(tmp_path / "2.ckpt"), 2)
    save(saved, tmp_path / "last.ckpt", 3)
    assert saved.newest() == (str(tmp_path / "last.ckpt"), 3)


def test_what_somebody_else_has_written_over_it_is_not_taken(saved: SavedCheckpoints, tmp_path: Path) -> None:
    save(saved, tmp_path / "0.ckpt", 0)
    save(saved, tmp_path / "1.ckpt", 1)
    torch.save({**CONTENT, "of": "another run"}, tmp_path / "1.ckpt")
    assert saved.newest() == (str(tmp_path / "0.ckpt"), 0)


def test_what_another_run_has_left_under_the_name_is_not_taken(saved: SavedCheckpoints, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "last.ckpt")  # before this run
    die(saved, tmp_path / "last.ckpt", 1, lambda: None)
    assert saved.newest() is None


def test_one_that_is_written_later_is_taken_when_it_is_whole(saved: SavedCheckpoints, tmp_path: Path) -> None:
    """As by AsyncCheckpointIO."""
    with saved.saving(tmp_path / "1.ckpt", 1, returns_early=True):
        pass
    assert saved.newest() is None
    torch.save(CONTENT, tmp_path / "1.ckpt")
    assert saved.newest() == (str(tmp_path / "1.ckpt"), 1)


def test_a_folder_of_files_counts_once_it_was_noted(saved: SavedCheckpoints, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        for part in range(3):
            (folder / str(part)).write_text("part")

    with saved.saving(tmp_path / "one", 1, returns_early=False):
        write(tmp_path / "one")
    die(saved, tmp_path / "two", 2, lambda: write(tmp_path / "two"))
    assert saved.newest() == (str(tmp_path / "one"), 1)
    (tmp_path / "one" / "1").unlink()
    assert saved.newest() is None


def test_a_url_is_kept(saved: SavedCheckpoints) -> None:
    import fsspec

    url, files = "memory://bucket/1.ckpt", fsspec.filesystem("memory")
    with saved.saving(url, 1, returns_early=False):
        files.pipe("/bucket/1.ckpt", b"content")
    newest = saved.newest()
    assert newest is not None
    assert newest[0].startswith("memory://")
    assert fsspec.core.url_to_fs(newest[0])[0].cat(newest[0]) == b"content"
    files.rm("/bucket/1.ckpt")
    assert saved.newest() is None


def test_each_fit_has_its_own(saved: SavedCheckpoints, tmp_path: Path) -> None:
    save(saved, tmp_path / "1.ckpt", 1)
    assert saved.file is not None
    assert SavedCheckpoints(saved.file, "2 module.Class").newest() is None
    assert SavedCheckpoints(saved.file, "1 module.Other").newest() is None
    assert SavedCheckpoints(saved.file, saved.fit).newest() is not None


def test_the_record_is_replaced_as_a_whole(
    saved: SavedCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saved, tmp_path / "1.ckpt", 1)

    def replace(self: Path, target: Path) -> None:
        raise Death

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Death):
        save(saved, tmp_path / "2.ckpt", 2)
    assert saved.newest() == (str(tmp_path / "1.ckpt"), 1)


def test_who_is_not_supervised_notes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTNING_STALE_SUPERVISOR", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert not restart.is_supervised()
    nobody = restart.begin_fit(nn.Module())
    assert nobody.file is None
    save(nobody, tmp_path / "1.ckpt", 1)
    assert nobody.newest() is None


def test_only_what_the_supervisor_has_started_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a rank or a job of a sweep that it has started in turn, which counts its fits by itself."""
    monkeypatch.setenv("LIGHTNING_STALE_SUPERVISOR", f"{os.getppid()} {tmp_path}")
    assert restart.begin_fit(nn.Module()).file == tmp_path / "lightning-stale-checkpoints.json"
    monkeypatch.setenv("LIGHTNING_STALE_SUPERVISOR", f"{os.getpid()} {tmp_path}")
    assert restart.begin_fit(nn.Module()).file is None
    assert restart.is_supervised()


def test_under_torchrun_its_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_STALE_SUPERVISOR", raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert not restart.is_supervised()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "run" / "attempt_1" / "0" / "error.json"))
    (tmp_path / "run").mkdir()
    assert restart.is_supervised()
    assert restart.begin_fit(nn.Module()).file == tmp_path / "run" / "lightning-stale-checkpoints.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    with pytest.warns(UserWarning, match="leave out --log-dir"):
        assert restart.begin_fit(nn.Module()).file is None
    shutil.rmtree(tmp_path / "run")


def test_fits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_STALE_SUPERVISOR", raising=False)
    first, second = restart.begin_fit(nn.Linear(1, 1)), restart.begin_fit(nn.Linear(1, 1))
    assert first.fit.endswith(" torch.nn.modules.linear.Linear")
    assert int(second.fit.split()[0]) == int(first.fit.split()[0]) + 1
