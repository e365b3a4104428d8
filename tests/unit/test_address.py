"""The server listens where its workers reach it, and nowhere else where that is known."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lightning_stale.transport import address


@pytest.mark.parametrize(
    ("main_address", "num_nodes", "found", "own", "chosen"),
    [
        ("head", 1, ["10.0.0.1"], ["10.0.0.1"], ("127.0.0.1", "127.0.0.1")),
        ("127.0.0.1", 2, ["127.0.0.1"], ["127.0.0.1"], ("127.0.0.1", "127.0.0.1")),
        ("localhost", 2, ["127.0.0.1"], ["127.0.0.1"], ("127.0.0.1", "127.0.0.1")),
        ("head", 2, ["10.0.0.1"], ["10.0.0.1"], ("10.0.0.1", "10.0.0.1")),
        ("head", 2, ["10.0.0.9", "10.0.0.1"], ["10.0.0.1"], ("10.0.0.1", "10.0.0.1")),
        ("head", 2, ["127.0.1.1"], ["127.0.1.1"], ("0.0.0.0", "head")),
        ("service", 2, ["10.0.0.9"], [], ("0.0.0.0", "service")),
        ("nowhere", 2, [], [], ("0.0.0.0", "nowhere")),
    ],
)
def test_choice(
    main_address: str,
    num_nodes: int,
    found: list[str],
    own: list[str],
    chosen: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def getaddrinfo(*_: Any) -> list[Any]:
        if not found:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(address, "_is_own", lambda one: one in own)
    assert address.choose(main_address, num_nodes) == chosen


def test_an_address_of_this_host_can_be_listened_on() -> None:
    assert address._is_own("127.0.0.1")
    assert not address._is_own("192.0.2.1")  # for documentation, of nobody
