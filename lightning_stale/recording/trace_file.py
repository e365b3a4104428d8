"""A trace in the Chrome format, which Perfetto opens: written as it happens, bounded, and readable after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TraceFile:
    """A JSON array of trace events, in a file that at no moment is longer than ``max_events`` of them.

    The array is never closed, as the format allows, so that it can be read whenever it is, also after a crash. When the
    file is full, the older half of it goes.

    Args:
        path: of the file; it is written over.
        max_events: how many events it has at most.

    Raises:
        ValueError: for fewer than 1000.
    """

    def __init__(self, path: Path, max_events: int) -> None:
        self._path, self._half = path, max_events // 2
        self._names: list[bytes] = []  # of processes and threads: at the beginning, whatever has gone
        self._older: list[bytes] = []
        self._newer: list[bytes] = []
        self._file = path.open("wb", buffering=0)
        self._file.write(b"[\n")

    def name(self, **event: Any) -> None:
        """Write what names a process or thread, which is kept."""
        line = _line(event)
        self._names.append(line)
        self._file.write(line)

    def write(self, *events: Mapping[str, Any]) -> None:
        """Write ``events``; each is with the system then."""
        lines = [_line(event) for event in events]
        self._newer += lines
        self._file.write(b"".join(lines))
        if len(self._newer) >= self._half:
            if self._older:
                self._begin_anew()
            self._older, self._newer = self._newer, []

    def _begin_anew(self) -> None:
        """Replace the file by one of the newer half alone, at once: who reads it has the one or the other."""
        temporary = self._path.with_name(f"{self._path.name}.new")
        file = temporary.open("wb", buffering=0)
        file.write(b"[\n" + b"".join(self._names) + b"".join(self._newer))
        os.replace(temporary, self._path)
        self._file.close()
        self._file = file

    def close(self) -> None:
        """Write no more."""
        self._file.close()


def merge_traces(parts: Sequence[bytes]) -> bytes:
    """Return one trace of several files of :class:`TraceFile`."""
    return b"[\n" + b"".join(part.removeprefix(b"[\n") for part in parts)


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b",\n"
