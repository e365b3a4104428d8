"""A log of events: what is read is what was written, also after a crash amid a write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stale import events as e
from lightning_stale.recording.log import KINDS, PER_S, EventLog, UnreadableLogError, read, turns
from lightning_stale.recording.updates import updates

TIMES = st.integers(0, 10**9).map(lambda microseconds: microseconds / PER_S)
WORKERS = st.integers(-1, 10_000)
NUMBERS = st.integers(0, 2**40)
BUILDS = {
    e.Turn: st.builds(e.Turn, TIMES, WORKERS, st.sampled_from(["push", "sync", "lost"])),
    e.Joined: st.builds(e.Joined, TIMES, WORKERS),
    e.Left: st.builds(e.Left, TIMES, WORKERS, st.booleans()),
    e.Met: st.builds(e.Met, TIMES, WORKERS),
    e.Failed: st.builds(e.Failed, TIMES, st.just("error"), st.text()),
    e.Pushed: st.builds(e.Pushed, TIMES, WORKERS, NUMBERS),
    e.Fingerprint: st.builds(
        e.Fingerprint, TIMES, WORKERS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary()
    ),
    e.Refused: st.builds(e.Refused, TIMES, WORKERS),
    e.Updated: st.builds(e.Updated, TIMES, NUMBERS),
    e.Released: st.builds(e.Released, TIMES, WORKERS, NUMBERS),
    e.ThresholdsSet: st.builds(e.ThresholdsSet, TIMES, st.dictionaries(st.text(), NUMBERS)),
    e.Spent: st.builds(e.Spent, TIMES, WORKERS, TIMES, TIMES),
    e.Planned: st.builds(e.Planned, TIMES, NUMBERS, NUMBERS),
    e.Granted: st.builds(e.Granted, TIMES, WORKERS, NUMBERS, NUMBERS, NUMBERS),
    e.Committed: st.builds(e.Committed, TIMES, WORKERS, NUMBERS),
    e.TakenBack: st.builds(e.TakenBack, TIMES, WORKERS, NUMBERS),
}
SOME = st.lists(st.one_of(*BUILDS.values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def written(path: Path, told: list[e.Event], header: dict[str, object] | None = None) -> Path:
    path.unlink(missing_ok=True)
    log = EventLog(path, header or {})
    for event in told:
        log.note(event)
    log.close()
    return path


@given(told=SOME)
def test_what_is_read_is_what_was_written(told: list[e.Event], folder: Path) -> None:
    """To the last bit of every time: a replayed paradigm is told the very same."""
    header, found = read(written(folder / "log", told, {"world_size": 3}))
    assert header["world_size"] == 3
    assert list(found) == told


def test_every_kind_of_the_file_is_tried() -> None:
    assert set(BUILDS) == set(KINDS)


@given(told=SOME, cut=st.integers(1, 40))
def test_one_that_was_cut_off_has_all_events_but_the_last(told: list[e.Event], cut: int, folder: Path) -> None:
    whole = written(folder / "log", told).read_bytes()
    header = len(written(folder / "header", []).read_bytes())
    cut_off = folder / "cut"
    cut_off.write_bytes(whole[: max(header, len(whole) - cut)])
    found = list(read(cut_off)[1])
    assert found == told[: len(found)]
    sizes = [len(written(folder / "log", told[:count]).read_bytes()) for count in range(len(told) + 1)]
    assert len(found) == max(count for count, size in enumerate(sizes) if size <= len(cut_off.read_bytes()))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    written(tmp_path / "log", [])
    with pytest.raises(FileExistsError):
        EventLog(tmp_path / "log", {})


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x93\x01\x02", b"worker,step,compute_s\n", b"\x81\xa6format\xa1x"])
def test_what_is_no_log_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(UnreadableLogError, match="is no record of a run"):
        read(tmp_path / "log")


def test_what_follows_a_turn_is_its_own() -> None:
    told: list[e.Event] = [
        *(e.Turn(1.0, 0, "push"), e.Pushed(1.0, 0, 2), e.Updated(1.0, 1)),
        *(e.Turn(2.0, 1, "sync"), e.Turn(3.0, 2, "bye"), e.Left(3.0, 2)),
    ]
    assert list(turns(told)) == [(told[0], told[1:3]), (told[3], []), (told[4], told[5:])]


def test_an_update_has_the_pushes_that_it_was_made_of() -> None:
    told: list[e.Event] = [
        *(e.Planned(0.5, 2, 8), e.Granted(0.5, 1, 7, 3, 5), e.Granted(0.5, 0, 8, 5, 6)),
        *(e.Pushed(1.0, 1, 0), e.Updated(1.0, 41)),  # batches 3 and 4
        *(e.Pushed(1.5, 0, 1), e.Refused(1.5, 0)),  # let go: no update
        *(e.Pushed(2.0, 1, 0), e.Pushed(2.0, 0, 3), e.Updated(2.5, 42)),  # a round
    ]
    found = list(updates(told))
    assert [(update.number, update.at) for update in found] == [(41, 0.5), (42, 2.0)]
    assert [[str(push) for push in update.pushes] for update in found] == [
        ["rank 1, its step 0, 0 updates stale, batches 3 to 4 of epoch 2"],
        [
            "rank 1, its step 1, 0 updates stale, batches 3 to 4 of epoch 2",
            "rank 0, its step 1, 3 updates stale, batch 5 of epoch 2",
        ],
    ]
