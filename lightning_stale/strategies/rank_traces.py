"""A timeline whose events are each rank's own: in a file of each while training runs, and in one when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_stale.events.recorder import Reader, Recorder
from lightning_stale.recording.options import of_rank
from lightning_stale.recording.trace_file import TraceFile, merge_traces


class RankTraces:
    """Those of the fits of one strategy, on one rank."""

    def __init__(self) -> None:
        self._asked: tuple[Path, int] | None = None
        self._whole: Path | None = None  # of the fit that runs
        self._part: Path | None = None
        self._file: TraceFile | None = None

    def ask(self, path: Path, max_events: int) -> None:
        """Have one of the next fit, at ``path``."""
        self._asked = path, max_events

    def begin(self, recorder: Recorder, rank: int, ranks: int, make: Callable[[TraceFile], Reader]) -> None:
        """If one was asked for, write what ``recorder`` is told, as ``make`` has it; each rank its share of events."""
        if self._asked is not None:
            (self._whole, max_events), self._asked = self._asked, None
            self._part = of_rank(self._whole, rank)
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = TraceFile(self._part, max_events // ranks)
            recorder.add(make(self._file))

    def end(self, gather: Callable[[bytes], list[bytes]], is_first: bool) -> None:
        """Make one of the files of all ranks.

        Args:
            gather: returns what each rank has given it.
            is_first: whether this rank writes it.
        """
        if self._file is None or self._part is None or self._whole is None:
            return
        self._file.close()
        parts = gather(self._part.read_bytes())
        if is_first:
            self._whole.write_bytes(merge_traces(parts))
        self._part.unlink()
        self._file = None
