"""What lets the workers of a run in, and nobody else: everything derives from one secret, which never travels."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from lightning_stale.transport.sockets import KeyPair


class ForgedError(RuntimeError):
    """A text that nobody who knows the secret has sealed."""


@dataclass(frozen=True)
class Credentials:
    """The keys of a run's server and workers, and a seal for what they tell each other in public.

    Both sides derive them: no key lies in torch's rendezvous store, which everybody who reaches its port can read and
    write. A server that somebody else puts in this one's place does not have its keys.
    """

    server: KeyPair
    worker: KeyPair
    seal_key: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: str, run: str) -> Credentials:
        """Return those of the run that is called ``run``, which need not be secret."""
        master = hashlib.blake2b(secret.encode()).digest()

        def key(purpose: bytes) -> bytes:
            return hashlib.blake2b(run.encode(), digest_size=32, key=master, person=purpose).digest()

        return cls(_pair(key(b"server")), _pair(key(b"worker")), key(b"seal"))

    def seal(self, text: str) -> str:
        """Return ``text`` with a seal that :meth:`unseal` checks."""
        return f"{self._code(text)} {text}"

    def unseal(self, sealed: str) -> str:
        """Return the text that was sealed.

        Raises:
            ForgedError: if it was changed, or sealed with another secret.
        """
        code, _, text = sealed.partition(" ")
        if not hmac.compare_digest(code.encode(), self._code(text).encode()):
            raise ForgedError("the seal is broken")
        return text

    def _code(self, text: str) -> str:
        return hmac.new(self.seal_key, text.encode(), hashlib.sha256).hexdigest()


def _pair(secret: bytes) -> KeyPair:
    encoded = z85.encode(secret)
    return KeyPair(zmq.curve_public(encoded).decode(), encoded.decode())
