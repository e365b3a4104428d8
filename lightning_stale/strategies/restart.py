"""A run that was started anew goes on from the newest checkpoint that it has saved, whoever has started it anew.

Who supervises a run (torchrun, or ``python -m lightning_stale run``) has a folder of its own for it, which outlives its
processes and which no other run has. Rank 0 notes there what each fit saves; so what another run has left in the same
folders is never taken for this one's, whatever the logger calls its version now. Fits are told apart by how many there
were before in the process, and by the class of the module. A fit that had ended resumes as well, and finds that
nothing is left to train: what the script does after it needs its weights.
"""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_stale.private import of_torch
from lightning_stale.supervisor import ATTEMPT, SUPERVISOR

_FILE = "lightning-stale-checkpoints.json"
_KEPT = 100
"""Entries per fit; those that no callback has removed since are among the newest."""

_ordinals = itertools.count(1)

Signature = list[list[Any]] | None
"""Name, size, time and number of each file that a checkpoint is made of; ``None``: there is none."""


@dataclass(frozen=True)
class SavedCheckpoints:
    """What one fit of a run has saved; kept in a file that is replaced as a whole.

    A checkpoint is noted before it is written, and again when it is there. After a death between the two, it counts if
    it is not what was there before, and whole: a zip file, as torch writes, ends with its table of contents, and has a
    checksum of each part.

    Args:
        file: where that is noted; ``None``: another process does, or nobody.
        fit: which fit of the process.
    """

    file: Path | None
    fit: str

    @contextmanager
    def saving(self, path: Any, step: int, returns_early: bool) -> Iterator[None]:
        """Note a checkpoint, around what writes it.

        Args:
            path: its own, or its URL.
            step: ``global_step``.
            returns_early: whether it is still being written at the end.
        """
        if self.file is None:
            yield
            return
        where = _absolute(path)
        entry = {"path": where, "step": step}
        self._note([*self._entries(), {**entry, "before": _signature(where)}])
        yield
        if not returns_early:
            others = [other for other in self._entries() if other["path"] != where]
            self._note([*others, {**entry, "whole": _signature(where)}])

    def newest(self) -> tuple[str, int] | None:
        """Return path and step of the newest checkpoint that is whole."""
        for entry in reversed(self._entries()):
            if _is_whole(entry):
                return entry["path"], entry["step"]
        return None

    def _entries(self) -> list[dict[str, Any]]:
        return [] if self.file is None else _read(self.file).get(self.fit, [])

    def _note(self, entries: list[dict[str, Any]]) -> None:
        assert self.file is not None
        new = self.file.with_name(f".{_FILE}")
        new.write_text(json.dumps({**_read(self.file), self.fit: entries[-_KEPT:]}))
        new.replace(self.file)


def begin_fit(module: object) -> SavedCheckpoints:
    """Return what the fit that is about to start has saved before; call it in the process that starts the ranks."""
    folder = _folder()
    kind = type(module)
    fit = f"{next(_ordinals)} {kind.__module__}.{kind.__qualname__}"
    return SavedCheckpoints(None if folder is None else folder / _FILE, fit)


def is_supervised() -> bool:
    """Whether somebody starts this run anew when it fails; the same on all ranks."""
    return SUPERVISOR in os.environ or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def where_to_go_on(saved: SavedCheckpoints | None, broadcast: Callable[[Any], Any]) -> str | None:
    """Return the checkpoint to go on from, on all ranks, and say so.

    Args:
        saved: on rank 0, what this fit has saved before.
        broadcast: gives all ranks what rank 0 has.
    """
    found: tuple[str, int] | None = broadcast(None if saved is None else saved.newest())
    restart = _restart()
    if found is not None:
        path, step = found
        rank_zero_info(f"{restart}: training goes on from step {step}, the newest checkpoint of this run: {path}")
        return path
    if not restart.startswith("Restart 0"):
        rank_zero_info(f"{restart}: this fit has saved no checkpoint yet, and begins as the script says.")
    return None


def _restart() -> str:
    if SUPERVISOR in os.environ:
        restart, _, most = os.environ.get(ATTEMPT, "0/0").partition("/")
    else:
        restart, most = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["TORCHELASTIC_MAX_RESTARTS"]
    return f"Restart {restart} of {most}"


def _folder() -> Path | None:
    if not is_supervised():
        return None
    if SUPERVISOR in os.environ:
        supervisor, _, folder = os.environ[SUPERVISOR].partition(" ")
        return Path(folder) if os.getppid() == int(supervisor) else None  # or it is a rank, or another's process
    of_run = of_torch.torchruns_folder()
    if of_run is None:
        rank_zero_warn(
            "torchrun keeps no folder for this run, so that a restart would begin anew instead of with the newest "
            "checkpoint: leave out --log-dir, or write one that can be written to"
        )
    return of_run


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        fits: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return fits


def _absolute(path: Any) -> str:
    filesystem, inner = url_to_fs(os.fspath(path))
    url: str = filesystem.unstrip_protocol(inner)
    return url.removeprefix("file://")


def _signature(path: str) -> Signature:
    filesystem, inner = url_to_fs(path)
    filesystem.invalidate_cache()
    if not filesystem.exists(inner):
        return None
    files = filesystem.find(inner, detail=True)
    return [
        [name, facts.get("size"), str(facts.get("mtime") or facts.get("LastModified") or ""), facts.get("ino")]
        for name, facts in sorted(files.items())
    ]


def _is_whole(entry: dict[str, Any]) -> bool:
    there = _signature(entry["path"])
    if there is None:
        return False
    if "whole" in entry:
        return bool(there == entry["whole"])
    return there != entry["before"] and _is_whole_zip(entry["path"])


def _is_whole_zip(path: str) -> bool:
    filesystem, inner = url_to_fs(path)
    try:
        with filesystem.open(inner, "rb") as file, zipfile.ZipFile(file) as parts:
            return parts.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
