"""What tells the workers where the server is."""

from __future__ import annotations

import torch

from lightning_stale.parameter_server.endpoint import Endpoint
from lightning_stale.parameter_server.layout import Layout
from lightning_stale.parameter_server.socket import KeyPair


def test_an_endpoint_travels_as_text() -> None:
    server, worker = KeyPair.new(), KeyPair.new()
    layout = Layout.of([torch.zeros(2, 3), torch.zeros(4, 5).t(), torch.zeros(())])
    endpoint = Endpoint(
        address="tcp://127.0.0.1:5555",
        host_id="host",
        pid=7,
        server_key=server.public,
        worker_public=worker.public,
        worker_secret=worker.secret,
        layout=layout.to_message(),
    )
    again = Endpoint.decode(endpoint.encode())
    assert again.address == "tcp://127.0.0.1:5555"
    assert (again.host_id, again.pid) == ("host", 7)
    assert (again.server_key, again.worker_public, again.worker_secret) == (
        server.public,
        worker.public,
        worker.secret,
    )
    assert Layout.from_message(again.layout) == layout


def test_key_pairs_are_fresh_and_printable() -> None:
    pairs = [KeyPair.new() for _ in range(3)]
    assert len({key for pair in pairs for key in (pair.public, pair.secret)}) == 6
    assert all(len(pair.public) == len(pair.secret) == 40 and pair.public.isprintable() for pair in pairs)
