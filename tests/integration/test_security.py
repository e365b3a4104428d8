"""What comes over the network is authenticated, bounded in size and never unpickled; strangers change nothing."""

from __future__ import annotations

import ast
import base64
import contextlib
import os
import pickle
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from torch import Tensor
from torch.distributed import PrefixStore
from zmq.utils import z85

import lightning_stale.parameter_server
from lightning_stale import StaleSyncStrategy
from lightning_stale.private.of_torch import rendezvous_store
from lightning_stale.transport import wire
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.endpoint import Endpoint
from lightning_stale.transport.sockets import KeyPair
from tests.integration.harness import signal_test, wait_for_file, workers
from tests.integration.models import Regression, assert_same, loader, trainer, weights

STEPS = 30
HELD_AT = 5


class Held(Regression):
    """Waits in one of its steps until the test lets it go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(momentum=0.9, lr=0.05)
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == HELD_AT:
            signal_test(self.folder, f"held-{self.global_rank}")
            wait_for_file(self.folder / "go")
        return self.loss(batch)


class Telling(StaleSyncStrategy):
    """Leaves word where the server is, of the keys, and of all that anybody finds in the rendezvous store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(paradigm="bsp", transport="tcp")
        self.folder = folder

    def _begin(self, run: str) -> None:
        introduce = self._host.introduce

        def tell(*args: Any, **kwargs: Any) -> tuple[Endpoint, Credentials]:
            endpoint, credentials = introduce(*args, **kwargs)
            if self.is_global_zero:
                store = rendezvous_store()
                while isinstance(store, PrefixStore):
                    store = store.underlying_store
                found = [(key, store.get(key)) for key in store.list_keys() if store.check([key])]
                (self.folder / "told").write_bytes(pickle.dumps((endpoint, credentials, found)))
            return endpoint, credentials

        self._host.introduce = tell  # type: ignore[method-assign]
        super()._begin(run)


def fit(rank: int, folder: Path) -> dict[str, Tensor]:
    """Train over TCP; rank 0 has its server print into a file."""
    if rank == 0:
        with (folder / "stderr").open("w") as stderr:
            os.dup2(stderr.fileno(), 2)
    model = Held(folder)
    trainer(2, Telling(folder), max_steps=STEPS).fit(model, loader(samples=512))
    return weights(model)


class Bomb:
    """What unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@contextlib.contextmanager
def dealer(
    endpoint: Endpoint, server_key: str, keys: KeyPair | None
) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """Yield a DEALER to the server, and the monitor of its events; ``keys=None``: without authentication."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        if keys is not None:
            sock.curve_serverkey = server_key.encode()
            sock.curve_publickey, sock.curve_secretkey = keys.public.encode(), keys.secret.encode()
        sock.linger = 1_000
        monitor = sock.get_monitor_socket()
        sock.connect(endpoint.address)
        try:
            yield sock, monitor
        finally:
            sock.disable_monitor()
            monitor.close(linger=0)


def wait_for_event(monitor: zmq.Socket[bytes], *events: int) -> None:
    from zmq.utils.monitor import recv_monitor_message

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if monitor.poll(100) and recv_monitor_message(monitor)["event"] in events:
            return
    raise AssertionError(f"none of the events {events} came")


REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
)


def annoy(endpoint: Endpoint, credentials: Credentials, folder: Path) -> None:
    """Do to the server's port what strangers do."""
    host, port = endpoint.address.removeprefix("tcp://").split(":")
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 100_000,
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE" + bytes(10_000),  # begins as ZMTP does
        os.urandom(1_000_000),
        pickle.dumps(Bomb(folder / "exploded")),
    ):
        with socket.create_connection((host, int(port))) as stranger, contextlib.suppress(OSError):
            stranger.sendall(garbage)

    hello = wire.encode_message("hello", rank=1, pid=os.getpid(), shared=False, anew=False)
    abort = wire.encode_message("abort", kind="error", text="a stranger's")
    server_key = credentials.server.public
    for keys in (None, KeyPair.new()):
        with dealer(endpoint, server_key, keys) as (sock, monitor):
            sock.send(hello, zmq.NOBLOCK)
            sock.send(abort, zmq.NOBLOCK)
            wait_for_event(monitor, *REFUSED)
            assert not sock.poll(0)

    insider = credentials.worker
    for frames in (
        [b""],
        [b"\x00" * 100],
        [pickle.dumps(Bomb(folder / "exploded"))],
        [wire.encode_message("hello", rank=99, pid=1, shared=False, anew=False)],
        [wire.encode_message("hello", rank=-1, pid=1, shared=False, anew=False)],
        [hello],  # of a rank that is there already
        [hello[:-3]],
        [hello, hello, hello],
        [abort],
        [wire.encode_message("bye")],
        [wire.encode_message("chunk", offset=0), bytes(64)],
        [b"\x81\xa4type\xa5hello"],  # without fields
        [b"\xdf\xff\xff\xff\xff"],  # msgpack: a map of 2**32 - 1 entries
        [b"\x81" * 100_000],  # nested a hundred thousand deep
        [bytes(wire.HEADER_BYTES + 1)],
    ):
        with dealer(endpoint, server_key, insider) as (sock, monitor):
            wait_for_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED)
            sock.send_multipart(frames)
            assert not sock.poll(50), "the server answered"
    with dealer(endpoint, server_key, insider) as (sock, monitor):
        wait_for_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        sock.send(bytes(wire.MAX_FRAME_BYTES + 1))
        wait_for_event(monitor, zmq.EVENT_DISCONNECTED)  # more than the limit is not even read


def try_what_the_store_holds(found: list[tuple[str, bytes]], endpoint: Endpoint, credentials: Credentials) -> None:
    """Try to come in with everything that stands in the rendezvous store, which anybody may list."""
    keys = [key for key, _ in found]
    (told,) = (key for key in keys if "lightning_stale/" in key)
    everything = "\n".join(f"{key}\n{value.decode(errors='replace')}" for key, value in found)
    assert endpoint.address in everything
    for pair in (credentials.server, credentials.worker):
        raw = z85.decode(pair.secret.encode())
        for form in (pair.secret, raw.hex(), base64.b64encode(raw).decode(), raw.decode(errors="replace")):
            assert form not in everything
    words = set(re.split(r"[\s\"+,:\[\]{}/]+", everything)) | {value.decode(errors="replace") for _, value in found}
    run = told.rpartition("lightning_stale/")[2]
    for word in words:  # as a secret, and as a key
        guesses = [Credentials.derive(word, run)]
        assert credentials not in guesses
        assert guesses[0].worker.public != credentials.worker.public
        if len(word) == 40 and word.isascii():
            with contextlib.suppress(ValueError, zmq.ZMQError):
                assert zmq.curve_public(word.encode()).decode() != credentials.worker.public


def test_strangers_change_nothing_and_are_logged_once(tmp_path: Path) -> None:
    results, logs = [], []
    for disturbed in (False, True):
        folder = tmp_path / str(disturbed)
        folder.mkdir()
        with workers(fit, 2, folder, folder) as group, contextlib.ExitStack() as idle:
            group.wait_for("held-0")
            group.wait_for("held-1")
            endpoint, credentials, found = pickle.loads((folder / "told").read_bytes())
            assert listening(group.server()) == [("127.0.0.1", int(endpoint.address.rsplit(":", 1)[1]))]
            if disturbed:
                host, port = endpoint.address.removeprefix("tcp://").split(":")
                for _ in range(20):  # these say nothing, and stay
                    idle.enter_context(socket.create_connection((host, int(port))))
                server_key = credentials.server.public
                knocking, _ = idle.enter_context(
                    dealer(endpoint, server_key, KeyPair.new())
                )  # this tries again and again
                knocking.send(b"let me in", zmq.NOBLOCK)
                annoy(endpoint, credentials, folder)
                try_what_the_store_holds(found, endpoint, credentials)
                assert group.server().memory_info().rss < 2 * 2**30
            (folder / "go").touch()
            ended = group.join(timeout=60)
        assert [worker.error for worker in ended] == ["", ""]
        assert not (folder / "exploded").exists()
        assert_same(ended[0].result, ended[1].result)
        results.append(ended[0].result)
        logs.append((folder / "stderr").read_text())
    assert_same(*results)
    assert [log.count("stranger") for log in logs] == [0, 1], logs[1]


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    return [tuple(c.laddr) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


PIPED = {"process.py", "pickling.py", "__main__.py"}
"""What talks to rank 0 through the pipe of a process that it has started itself."""


@pytest.mark.parametrize(
    "path", sorted(Path(lightning_stale.parameter_server.__path__[0]).glob("*.py")), ids=lambda path: path.name
)
def test_what_reads_from_the_network_cannot_unpickle(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if path.name in PIPED:
        assert not imported & {"zmq", "msgpack", "socket"}
        return
    roots = {name.split(".")[0] for name in imported}
    assert not roots & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "joblib"}
    assert "lightning_stale.parameter_server.pickling" not in imported
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"recv_pyobj", "send_pyobj", "load", "eval", "exec", "__import__"}
