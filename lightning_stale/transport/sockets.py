"""The authenticated sockets between workers and server (CURVE, RFC 26), and what happens on their connections."""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from lightning_stale.transport import wire

_ZAP_DOMAIN = "lightning-stale"


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, each key as 40 printable characters (Z85)."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> KeyPair:
        """Return a fresh pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


class _OneKey:
    """Lets in who holds the secret key of ``public``."""

    def __init__(self, public: str) -> None:
        self._key = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


class ServerSocket:
    """A ROUTER that only the workers of this run can talk to.

    Args:
        host: the address to listen on.
        server: the server's keys.
        worker_key: the public key that the workers of this run share.
        patience_s: how long the other end of a connection may give no sign of life, before it is taken for dead.
    """

    def __init__(self, host: str, server: KeyPair, worker_key: str, patience_s: float | None = None) -> None:
        self._patience_s = patience_s
        self.context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        try:
            self._listen(host, server, worker_key)
        except BaseException:
            self._authenticator.stop()
            self.context.destroy(linger=0)
            raise

    def _listen(self, host: str, server: KeyPair, worker_key: str) -> None:
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, _OneKey(worker_key))
        self.router = self.context.socket(zmq.ROUTER)
        self.router.curve_server = True
        self.router.curve_publickey = server.public.encode()
        self.router.curve_secretkey = server.secret.encode()
        self.router.zap_domain = _ZAP_DOMAIN.encode()
        _set_limits(self.router, self._patience_s)
        self.router.router_mandatory = True  # a message to a worker that is gone is an error, not lost in silence
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        self.monitor = self.router.get_monitor_socket(events)
        self._open: set[int] = set()
        self.port: int = self.router.bind_to_random_port(f"tcp://{host}")

    def closed_connections(self) -> tuple[list[int], bool]:
        """Return the descriptors of connections that have ended, and whether a handshake was refused."""
        descriptors, refused = [], False
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)
            connection = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(connection)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                descriptors.append(connection)
                self._open.discard(connection)
            else:
                refused = True
        return descriptors, refused

    def is_open(self, connection: int) -> bool:
        """Whether the connection that has this descriptor now is open, as of the last :meth:`closed_connections`."""
        return connection in self._open

    def close(self) -> None:
        """Send what is queued (for at most two seconds), and close."""
        self.router.disable_monitor()
        self.monitor.close(linger=0)
        self.router.close(linger=2_000)
        self._authenticator.stop()
        self.context.term()


class WorkerSocket:
    """A DEALER to the server of this run, which knows when the connection breaks."""

    def __init__(self, address: str, server_key: str, worker: KeyPair) -> None:
        self.context = zmq.Context()
        try:
            self._connect(address, server_key, worker)
        except BaseException:
            self.drop()
            raise

    def _connect(self, address: str, server_key: str, worker: KeyPair) -> None:
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.curve_serverkey = server_key.encode()
        self.dealer.curve_publickey = worker.public.encode()
        self.dealer.curve_secretkey = worker.secret.encode()
        _set_limits(self.dealer)
        self._monitor = self.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.dealer.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self.dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._broken = False

    def wait(self, timeout_ms: int) -> bool:
        """Return whether a message is there, after at most ``timeout_ms``.

        Raises:
            ConnectionError: if the connection has ended and no message is left.
        """
        ready = dict(self._poller.poll(0 if self._broken else timeout_ms))
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            self._broken = True
        if self.dealer.poll(0):
            return True
        if self._broken:
            raise ConnectionError
        return False

    def close(self) -> None:
        """Send what is queued (for at most two seconds), and close."""
        self.dealer.disable_monitor()
        self._monitor.close(linger=0)
        self.dealer.close(linger=0 if self._broken else 2_000)
        self.context.term()

    def drop(self) -> None:
        """Close at once, whatever is queued: a context that is left with open sockets blocks when it is collected."""
        self.context.destroy(linger=0)


def _set_limits(socket: zmq.Socket[bytes], patience_s: float | None = None) -> None:
    patience_ms = wire.HEARTBEAT_TIMEOUT_MS if patience_s is None else round(patience_s * 1_000)
    socket.maxmsgsize = wire.MAX_FRAME_BYTES
    socket.sndhwm = socket.rcvhwm = 0  # a message is never dropped; its size is bounded, and each waits for its reply
    socket.heartbeat_ivl = min(
        wire.HEARTBEAT_MS, patience_ms // 4
    )  # finds a host that vanished; a process that dies closes its connection
    socket.heartbeat_timeout = patience_ms
