"""Shared memory: where it is made, that it is shared, and that nothing of it is left in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_stale.transport import memory
from lightning_stale.transport.memory import SharedMemoryError, choose_folder, create_segment, open_segment

MIB = 2**20
needs_proc = pytest.mark.skipif(not memory.supported(), reason="shared memory needs Linux")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes per folder, as the system would report them."""
    rooms = {"/first": 10 * MIB, "/second": 20 * MIB, "/third": 30 * MIB}
    monkeypatch.setattr(memory, "_free_bytes", lambda folder: rooms.get(folder, -1))
    return rooms


FOLDERS = ["/first", "/second", "/third"]


def test_the_first_folder_with_room_is_taken_without_a_warning(rooms: dict[str, int]) -> None:
    assert choose_folder(10 * MIB, FOLDERS) == ("/first", None)


@pytest.mark.parametrize(("nbytes", "folder"), [(10 * MIB + 1, "/second"), (20 * MIB + 1, "/third")])
def test_another_folder_is_taken_with_a_warning(rooms: dict[str, int], nbytes: int, folder: str) -> None:
    chosen, warning = choose_folder(nbytes, FOLDERS)
    assert chosen == folder
    assert warning is not None
    assert "/first has 10 MiB free" in warning
    assert f"need {nbytes // MIB} MiB" in warning
    assert f"{folder} is used instead" in warning
    assert "--shm-size" in warning


def test_a_folder_that_does_not_exist_is_passed_over(rooms: dict[str, int]) -> None:
    chosen, warning = choose_folder(MIB, ["/missing", "/second"])
    assert chosen == "/second"
    assert warning is not None
    assert warning.startswith("/missing cannot be used, and the workers of this host need 1 MiB")


def test_no_room_anywhere_is_an_error_that_says_what_to_write(rooms: dict[str, int]) -> None:
    with pytest.raises(SharedMemoryError, match="need 31 MiB of shared memory") as error:
        choose_folder(31 * MIB, [*FOLDERS, "/missing"])
    for part in (
        "/first has 10 MiB",
        "/third has 30 MiB free",
        "/missing cannot be used",
        "StaleSyncStrategy(transport='tcp')",
    ):
        assert part in str(error.value)


def test_real_folders(tmp_path: Path) -> None:
    missing, nothing = str(tmp_path / "missing"), str(tmp_path)
    assert choose_folder(1, [nothing]) == (nothing, None)
    chosen, warning = choose_folder(1, [missing, nothing])
    assert chosen == nothing
    assert warning is not None
    with pytest.raises(SharedMemoryError):
        choose_folder(2**62, [nothing])


def test_the_default_folders_are_dev_shm_and_the_temporary_one(
    monkeypatch: pytest.MonkeyPatch, rooms: dict[str, int]
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/second")
    rooms["/dev/shm"] = 0
    chosen, warning = choose_folder(MIB)
    assert chosen == "/second"
    assert warning is not None
    assert warning.startswith("/dev/shm has 0 MiB free")


@needs_proc
class TestSegments:
    def test_a_segment_is_zeroed_and_shared_both_ways(self, tmp_path: Path) -> None:
        segment = create_segment(1000, str(tmp_path))
        assert segment.data.numel() == 1000
        assert not segment.data.any()
        opened = open_segment(segment.path, 1000, segment.token)
        segment.data[0], segment.data[999] = 7, 8
        assert (opened[0], opened[999]) == (7, 8)
        opened.fill_(5)
        assert torch.equal(segment.data, torch.full((1000,), 5, dtype=torch.uint8))

    def test_the_folder_is_empty_while_the_segment_lives(self, tmp_path: Path) -> None:
        segment = create_segment(1000, str(tmp_path))
        opened = open_segment(segment.path, 1000, segment.token)
        assert list(tmp_path.iterdir()) == []
        assert opened.numel() == segment.data.numel()

    def test_who_opens_a_segment_leaves_no_descriptor_behind(self, tmp_path: Path) -> None:
        segment = create_segment(1000, str(tmp_path))
        before = len(os.listdir("/proc/self/fd"))
        opened = open_segment(segment.path, 1000, segment.token)
        opened[0] = 7
        del opened
        assert len(os.listdir("/proc/self/fd")) == before, "opening has left a descriptor behind"
        assert segment.data[0] == 7

    def test_each_segment_has_a_token_of_its_own(self, tmp_path: Path) -> None:
        first, second = (create_segment(1000, str(tmp_path)) for _ in range(2))
        assert first.token != second.token
        with pytest.raises(SharedMemoryError, match="is not the shared memory of the parameter server"):
            open_segment(second.path, 1000, first.token)

    def test_the_buffer_starts_behind_the_token_at_a_cache_line(self, tmp_path: Path) -> None:
        segment = create_segment(1000, str(tmp_path))
        segment.data.fill_(255)
        assert open_segment(segment.path, 1000, segment.token).numel() == 1000
        assert segment.data.data_ptr() % 64 == 0

    def test_another_length_is_refused(self, tmp_path: Path) -> None:
        segment = create_segment(1000, str(tmp_path))
        with pytest.raises(SharedMemoryError, match="is not the shared memory"):
            open_segment(segment.path, 1001, segment.token)

    def test_a_path_that_cannot_be_opened_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SharedMemoryError, match="cannot open the shared memory of the parameter server"):
            open_segment(str(tmp_path / "missing"), 1000, b"")

    def test_a_full_folder_is_an_error_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SharedMemoryError, match=r"cannot take 1 MiB of shared memory in .*No space left"):
            create_segment(MIB, str(tmp_path))
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_folder_that_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(SharedMemoryError, match="cannot take 1 MiB of shared memory in"):
            create_segment(MIB, str(tmp_path / "missing"))


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_only, other = tmp_path / "read-only", tmp_path / "other"
    read_only.mkdir()
    other.mkdir()
    monkeypatch.setattr(memory.os, "access", lambda folder, mode: folder != str(read_only))  # root may write anywhere
    folder, warning = memory.choose_folder(1, [str(read_only), str(other)])
    assert folder == str(other)
    assert warning is not None
    assert f"{read_only} cannot be used" in warning
