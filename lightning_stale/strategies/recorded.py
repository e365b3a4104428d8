"""Which file each fit of a strategy is recorded in, and which it replays."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stale.recording.log import UnreadableLogError, read
from lightning_stale.recording.options import REPLAY, Recording, free, numbered

NAME = "staleness.record"
_fits_of_process = itertools.count(1)


class Records:
    """Those of the fits of one strategy.

    Args:
        record: the file of the first fit, whose name is numbered for those after it, and where there is such a file
            already; ``True``: ``staleness.record`` in the folder of the log.
        replay: the record of the fit that the first one is to be again; those after it, of the numbered ones.

    Raises:
        ValueError: if they are no files, or there is nothing to replay.
    """

    def __init__(self, record: bool | str | Path, replay: str | Path | None) -> None:
        if not isinstance(record, (bool, str, Path)) or record == "":
            raise ValueError(f"record={record!r}: write True, or the path of a file that is to be written")
        if replay is not None and (not isinstance(replay, (str, Path)) or replay == ""):
            raise ValueError(f"replay={replay!r}: write the path of a file that record= has written")
        self.record, self.replay = record, replay
        self.trace: Path | None = None
        """Where a timeline of the next fit is written."""
        self.trace_events = 0
        self._fits = 0
        self._base: Path | None = None  # where the first fit is recorded
        if replay is not None:
            _check(Path(replay), "replay")

    def next(self, trainer: Trainer) -> Recording:
        """Return what is recorded of the fit that is about to start, and replayed; the same call on all ranks."""
        self._fits += 1
        fit = next(_fits_of_process)
        replay, until = _told(fit)
        if replay is None and self.replay is not None:
            replay = numbered(Path(self.replay), self._fits)
            _check(replay, f"fit number {self._fits} of the strategy has replay")
        record = None if self.record is False else self._choose(trainer)
        trace, self.trace = self.trace, None
        return Recording(record, replay, until, trace, self.trace_events, fit)

    def _choose(self, trainer: Trainer) -> Path:
        """Return where the fit is recorded, as rank 0 has it, which makes sure that it can be."""
        path = (
            Path(self.record) if isinstance(self.record, (str, Path)) else folder_of_log(trainer, "record=True") / NAME
        )
        if trainer.is_global_zero:
            path = free(path) if self._base is None else free(numbered(self._base, self._fits))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("xb").close()
                path.unlink()
            except OSError as error:
                raise MisconfigurationException(
                    f"record={self.record!r}: {error}. Write the path of a file in a folder that can be written"
                ) from error
            rank_zero_info(f"This fit is recorded in {path}")
        chosen = Path(trainer.strategy.broadcast(str(path)))
        self._base = self._base or chosen
        return chosen


def _check(path: Path, name: str) -> None:
    try:
        read(path)
    except (OSError, UnreadableLogError) as error:
        raise ValueError(
            f"{name}={str(path)!r}: {error}. Write the path of a file that a fit with record=True has written"
        ) from error


def _told(fit: int) -> tuple[Path | None, int | None]:
    """Return the record that the command has this fit of the process replay, and the update to end with."""
    told = os.environ.get(REPLAY, "")
    path, _, last = told.partition("\n")
    if not told or read(path)[0].get("fit", 1) != fit:
        return None, None
    return Path(path), int(last) if last else None


def folder_of_log(trainer: Trainer, what: str) -> Path:
    """Return the folder of the log; the same call on all ranks.

    Raises:
        MisconfigurationException: if it is a remote one; ``what`` is what asks for it.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    if "://" in str(folder):
        raise MisconfigurationException(
            f"{what}, and the log is in {folder}, where no file can be written bit by bit: give it the path of a local "
            "file"
        )
    return Path(folder)
