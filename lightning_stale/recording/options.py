"""What is recorded of a run, and which recorded one it is to be again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_stale.events import Recorder
from lightning_stale.recording.log import EventLog, read
from lightning_stale.recording.trace import StaleSyncTrace
from lightning_stale.recording.trace_file import TraceFile
from lightning_stale.recording.turns import RecordedTurns, ReplayedTurns, ReplayError, Turns

REPLAY = "LIGHTNING_STALE_REPLAY"
"""Names a record, and after a line end the update to end with: the fit of the process replays it that it is of."""

_MEANS = {
    "paradigm": "write the same paradigm, with the thresholds that it began with",
    "apply": "write the same apply=",
    "world_size": "have as many workers: devices=, num_nodes=",
    "on_demand": "write the same data=",
    "elastic": "write the same elastic=",
    "updates": "begin where it began: trainer.fit(ckpt_path=...) with the checkpoint that it went on from, if any",
    "strategy": "write the same strategy",
    "interval": "write the same interval=",
    "merge": "write the same merge=",
}


@dataclass(frozen=True)
class Recording:
    """What is recorded of one fit, and replayed.

    Args:
        record: the file to write; ``None``: none.
        replay: the record whose order it follows; ``None``: none.
        until: with ``replay``: the update to end with.
        trace: the file of a timeline to write; ``None``: none.
        trace_events: how many events that has at most.
        fit: which fit of its process it is, from 1.
    """

    record: Path | None = None
    replay: Path | None = None
    until: int | None = None
    trace: Path | None = None
    trace_events: int = 0
    fit: int = 1

    @property
    def looks_at_pushes(self) -> bool:
        """Whether each push is compared, or to be compared later."""
        return self.record is not None or self.replay is not None

    def check(self, header: Mapping[str, Any]) -> None:
        """See that the fit can be the one that is replayed.

        Args:
            header: of the fit that is about to start.

        Raises:
            ReplayError: if it cannot, with the reason.
            UnreadableLogError: if the file is no record.
        """
        if self.replay is None:
            return
        theirs, _ = read(self.replay)
        for name, cure in _MEANS.items():
            if theirs.get(name) != header.get(name):
                raise ReplayError(
                    f"replay={str(self.replay)!r}: the record is of a fit with {name}={theirs.get(name)!r}, and this "
                    f"one has {name}={header.get(name)!r}: {cure}"
                )
        weights = theirs.get("weights", {})
        gone = [name for name in weights if name not in header.get("weights", {})]
        if gone:
            raise ReplayError(
                f"replay={str(self.replay)!r}: the record is of a model with the parameter {gone[0]!r}, which this one "
                "lacks, or does not train: train the model that was recorded"
            )
        for name, value in header.get("weights", {}).items():
            if weights.get(name) != value:
                raise ReplayError(
                    f"replay={str(self.replay)!r}: the fit begins with other weights than the recorded one, first in "
                    f"{name!r}: call seed_everything(SEED) before the model is made, or load what was loaded then"
                )

    def begin(self, header: Mapping[str, Any], recorder: Recorder, lose: Callable[[int], object]) -> Turns:
        """Open the files; return in which order messages are to be taken.

        Args:
            header: of the fit.
            recorder: of all that happens from now on.
            lose: makes a worker one that is lost.
        """
        turns = Turns()
        if self.replay is not None:
            turns = replayed = ReplayedTurns(read(self.replay)[1], lose, recorder.record, ahead=read(self.replay)[1])
            recorder.add(replayed)
        elif self.record is not None or self.trace is not None:
            turns = RecordedTurns(recorder.record)
        if self.trace is not None:
            recorder.add(StaleSyncTrace(TraceFile(self.trace, self.trace_events)))
        if self.record is not None:
            recorder.add(EventLog(self.record, header))
        return turns


def of_rank(path: Path, rank: int | str) -> Path:
    """Return where a rank keeps what it alone knows, beside the record at ``path``."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def free(path: Path) -> Path:
    """Return ``path``, or the first of ``name.2.suffix``, ``name.3.suffix`` ... that is free, also of files of ranks.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_stale.recording.options import free
        >>> path = Path(tempfile.mkdtemp()) / "staleness.record"
        >>> path.touch()
        >>> free(path).name
        'staleness.2.record'
    """
    number, candidate = 1, path
    while candidate.exists() or any(candidate.parent.glob(of_rank(candidate, "*").name)):
        number += 1
        candidate = numbered(path, number)
    return candidate


def numbered(path: Path, number: int) -> Path:
    """Return what ``path`` is called for the fit of this number, from 1."""
    return path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
