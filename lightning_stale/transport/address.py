"""Which address the server listens on, and which one the workers connect to."""

from __future__ import annotations

import ipaddress
import socket

_LOOPBACK, _ALL = "127.0.0.1", "0.0.0.0"  # noqa: S104 - where nothing better is known; authenticated


def choose(main_address: str, num_nodes: int) -> tuple[str, str]:
    """Return the address to listen on, and the one to connect to.

    Workers of one host need no other interface than the loopback. With several, it is the one that ``main_address``
    (MASTER_ADDR) names, if it is this host's own: a name may lead to a router in front of it, or on rank 0's host only
    to the loopback (``127.0.1.1 myhost`` in Debian's ``/etc/hosts``); then all interfaces are.

    Args:
        main_address: rank 0's host, as the other ranks reach it.
        num_nodes: the number of hosts.
    """
    if num_nodes == 1 or _is_loopback(main_address) or main_address == "localhost":
        return _LOOPBACK, _LOOPBACK
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(main_address, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError:
        found = []
    for address in found:
        if not _is_loopback(address) and _is_own(address):
            return address, address
    return _ALL, main_address


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
