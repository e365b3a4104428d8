"""Weights on their way: a few chunks at a time, of one version for each receiver."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor

from lightning_stale.transport import wire
from lightning_stale.transport.delivery import WINDOW, Deliveries

CHUNK = 16


class Receivers:
    """Notes what has been sent to whom."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, list[tuple[int, bytes]]] = collections.defaultdict(list)

    def send(self, receiver: bytes, offset: int, data: memoryview) -> None:
        self.chunks[receiver].append((offset, bytes(data)))

    def received(self, receiver: bytes, nbytes: int) -> list[int]:
        buffer = bytearray(nbytes)
        for offset, data in self.chunks[receiver]:
            buffer[offset : offset + len(data)] = data
        return list(buffer)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK_BYTES", CHUNK)


def numbered(nbytes: int) -> Tensor:
    return torch.arange(nbytes, dtype=torch.int64).remainder(251).to(torch.uint8)


def test_only_a_window_is_sent_before_the_receiver_asks_for_more() -> None:
    receivers, weights = Receivers(), numbered(CHUNK * (WINDOW + 2) + 5)
    deliveries = Deliveries(receivers.send)
    for receiver in (b"a", b"b"):
        deliveries.begin(receiver, [(0, weights)])
    assert [len(receivers.chunks[receiver]) for receiver in (b"a", b"b")] == [WINDOW, WINDOW]
    for _ in range(3):
        deliveries.send_more(b"a")
    assert receivers.received(b"a", weights.numel()) == weights.tolist()
    assert len(receivers.chunks[b"b"]) == WINDOW
    for _ in range(5):  # asked for beyond the end
        deliveries.send_more(b"a")
    deliveries.send_more(b"nobody")
    assert len(receivers.chunks[b"a"]) == WINDOW + 3


def test_pieces_lie_where_they_belong() -> None:
    receivers, weights = Receivers(), numbered(100)
    Deliveries(receivers.send).begin(b"a", [(4, weights[4:30]), (40, weights[40:40]), (50, weights[50:60])])
    expected = [value if 4 <= place < 30 or 50 <= place < 60 else 0 for place, value in enumerate(weights.tolist())]
    assert receivers.received(b"a", 100) == expected


def test_each_receiver_gets_the_version_of_its_begin_and_those_of_the_same_share_a_copy() -> None:
    receivers, weights = Receivers(), torch.zeros(CHUNK * 3 * WINDOW, dtype=torch.uint8)
    deliveries = Deliveries(receivers.send)
    open_ = deliveries._open
    for version, receiver in enumerate((b"a", b"b", b"c")):
        if receiver == b"c":
            deliveries.keep()
            weights.fill_(2)
        deliveries.begin(receiver, [(0, weights)])
        assert version < 3
    assert open_[b"a"].pieces[0][1].data_ptr() == open_[b"b"].pieces[0][1].data_ptr() != weights.data_ptr()
    assert open_[b"c"].pieces[0][1].data_ptr() == weights.data_ptr()
    for _ in range(3 * WINDOW):
        for receiver in (b"a", b"b", b"c"):
            deliveries.send_more(receiver)
    for receiver, value in ((b"a", 0), (b"b", 0), (b"c", 2)):
        assert set(receivers.received(receiver, weights.numel())) == {value}
    assert not open_, "a copy is kept for nobody"


def test_a_new_delivery_takes_the_place_of_the_last_one() -> None:
    receivers = Receivers()
    deliveries = Deliveries(receivers.send)
    deliveries.begin(b"a", [(0, numbered(CHUNK * 2 * WINDOW))])
    deliveries.begin(b"a", [(0, torch.full((3,), 9, dtype=torch.uint8))])
    sent = len(receivers.chunks[b"a"])
    deliveries.send_more(b"a")
    deliveries.end(b"a")
    assert len(receivers.chunks[b"a"]) == sent
    assert receivers.chunks[b"a"][-1] == (0, bytes([9] * 3))
