"""A run's events as a file: a few dozen bytes an update, readable up to the last event however the run has ended."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from lightning_stale.events import kinds
from lightning_stale.events.kinds import Event

FORMAT = "lightning_stale events 1"
PER_S = 1_000_000
"""Times are whole microseconds."""

KINDS: tuple[type[Event], ...] = (
    kinds.Turn,
    kinds.Joined,
    kinds.Left,
    kinds.Met,
    kinds.Failed,
    kinds.Pushed,
    kinds.Fingerprint,
    kinds.Refused,
    kinds.Updated,
    kinds.Released,
    kinds.ThresholdsSet,
    kinds.Spent,
    kinds.Planned,
    kinds.Granted,
    kinds.Committed,
    kinds.TakenBack,
)
"""By the number that stands for each in the file: what happens where a run's workers come together."""
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_FIELDS = {kind: [field.name for field in fields(kind)[1:]] for kind in KINDS}
_SECONDS = {kind: [typing.get_type_hints(kind)[name] is float for name in names] for kind, names in _FIELDS.items()}


class UnreadableLogError(ValueError):
    """A file is no log of events."""


class EventLog:
    """Writes events to a file: a reader of a :class:`~lightning_stale.events.Recorder`.

    The file is a stream of msgpack: a map (the header), then an array for each event, with the number of its kind, the
    microseconds since the one before, and its fields. Each is with the system once :meth:`note` has returned, so that
    it is there also if this process is killed.

    Args:
        path: of the file, which must not exist.
        header: what is to be known of the run.

    Raises:
        FileExistsError: if the file exists.

    Example::

        >>> import tempfile
        >>> from lightning_stale.events import Pushed
        >>> from lightning_stale.recording.log import EventLog, read
        >>> path = Path(tempfile.mkdtemp()) / "run.record"
        >>> log = EventLog(path, {"world_size": 2})
        >>> log.note(Pushed(at=0.5, worker=1, staleness=3))
        >>> log.close()
        >>> header, events = read(path)
        >>> header["world_size"], list(events)
        (2, [Pushed(at=0.5, worker=1, staleness=3)])
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._at = 0
        self._pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True).pack
        self._file.write(self._pack({"format": FORMAT, **header}))

    def note(self, event: Event) -> None:
        """See :class:`~lightning_stale.events.recorder.Reader`."""
        kind = type(event)
        number = _NUMBER.get(kind)
        if number is None:
            return
        at = round(event.at * PER_S)
        values = (
            round(getattr(event, name) * PER_S) if is_time else getattr(event, name)
            for name, is_time in zip(_FIELDS[kind], _SECONDS[kind], strict=True)
        )
        self._file.write(self._pack([number, at - self._at, *values]))
        self._at = at

    def close(self) -> None:
        """Write no more."""
        self._file.close()


def read(path: Path | str) -> tuple[dict[str, Any], Iterator[Event]]:
    """Return the header of a log, and its events; one that was cut off amid a write ends with the event before.

    Args:
        path: of a file that :class:`EventLog` has written.

    Raises:
        UnreadableLogError: if it is none.
        OSError: if it cannot be read.
    """
    with Path(path).open("rb") as file:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, max_buffer_size=0)
        try:
            header = next(unpacker)
        except (ValueError, StopIteration, msgpack.UnpackException) as error:
            raise UnreadableLogError(f"{path} is no record of a run: {error or 'it is empty'}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise UnreadableLogError(f"{path} is no record of a run that can be read here: {found!r}, and not {FORMAT!r}")
    return header, _events(Path(path))


def is_record(path: Path | str) -> bool:
    """Whether the file is a log of events, and no other."""
    try:
        read(path)
    except UnreadableLogError:
        return False
    return True


def _events(path: Path) -> Iterator[Event]:
    at, size = 0, os.path.getsize(path)
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, max_buffer_size=max(size, 1))
        next(unpacker)
        for number, since, *values in unpacker:
            kind = KINDS[number]
            at += since
            times = _SECONDS[kind]
            yield kind(at / PER_S, *(v / PER_S if is_time else v for v, is_time in zip(values, times, strict=True)))


def turns(events: Iterable[Event]) -> Iterator[tuple[kinds.Turn, list[Event]]]:
    """Yield each turn with what has followed from it."""
    turn: kinds.Turn | None = None
    followed: list[Event] = []
    for event in events:
        if isinstance(event, kinds.Turn):
            if turn is not None:
                yield turn, followed
            turn, followed = event, []
        else:
            followed.append(event)
    if turn is not None:
        yield turn, followed
