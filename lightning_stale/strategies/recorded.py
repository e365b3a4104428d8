"""Which file each fit of a strategy is recorded in, and which it replays."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stale.recording.log import UnreadableLogError, read
from lightning_stale.recording.options import REPLAY, Recording, free, numbered

NAME = "staleness.record"


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
        if replay is not None:
            _check(Path(replay), "replay")

    def next(self, trainer: Trainer) -> Recording:
        """Return what is recorded of the fit that is about to start, and replayed; the same call on all ranks."""
        self._fits += 1
        told = os.environ.pop(REPLAY, "")  # the first fit of the process, whatever strategies follow
        replay, until = self.replay, None
        if told:
            replay, _, last = told.partition("\n")
            until = int(last) if last else None
        record = None
        if self.record is not False:
            record = _folder(trainer) / NAME if self.record is True else Path(self.record)
            record = free(numbered(record, self._fits))
        if replay is not None and not told:
            replay = numbered(Path(replay), self._fits)
            _check(replay, f"fit number {self._fits} of the strategy has replay")
        if record is not None and trainer.is_global_zero:
            record.parent.mkdir(parents=True, exist_ok=True)
            rank_zero_info(f"This fit is recorded in {record}")
        trace, self.trace = self.trace, None
        return Recording(record, None if replay is None else Path(replay), until, trace, self.trace_events)


def _check(path: Path, name: str) -> None:
    try:
        read(path)
    except (OSError, UnreadableLogError) as error:
        raise ValueError(
            f"{name}={str(path)!r}: {error}. Write the path of a file that a fit with record=True has written"
        ) from error


def _folder(trainer: Trainer) -> Path:
    folder = trainer.log_dir or trainer.default_root_dir
    if "://" in str(folder):
        raise MisconfigurationException(
            f"record=True, and the log is in {folder}, where no file can be written bit by bit: write record='FILE' "
            "with the path of a local file"
        )
    return Path(folder)
