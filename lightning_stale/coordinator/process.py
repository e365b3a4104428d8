"""Start a process that serves a run, and end it: by itself when nobody is left, and never later than rank 0."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from lightning_stale.recording.options import Recording
from lightning_stale.transport.credentials import Credentials
from lightning_stale.transport.sockets import KeyPair

START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 3.0
SERVER_OPTION = "lightning_stale_server"
"""``python -X lightning_stale_server`` marks such a process: it imports as little as possible, and no lightning."""


class ServerStartError(RuntimeError):
    """A process that serves the run could not be started."""


class ChildProcess:
    """A process as seen by global rank 0, which starts it: it begins to import at once, and to serve when told what.

    Its standard input carries what it is to do, and then stays open as a lifeline. Its standard output carries an empty
    line whenever it gets on, and then the port on which it listens, or why there is none.

    Args:
        module: what it runs.
        name: of the process, in errors.
        hint: what is mostly wrong when it does not start.
    """

    def __init__(self, module: str, name: str, hint: str = "") -> None:
        command = [sys.executable, "-X", SERVER_OPTION, "-m", module, str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._name, self._hint = name, hint
        self._serving = False
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, *parts: bytes | memoryview) -> None:
        """Send ``parts`` of what it is to do.

        Raises:
            ServerStartError: if it has ended.
        """
        try:
            for part in parts:
                self._stdin.write(part)
        except OSError as error:
            raise self._not_started(error) from error

    def await_port(self) -> int:
        """Return the port once it listens.

        Raises:
            ServerStartError: if it does not come up.
        """
        try:
            self._stdin.flush()
            port = self._read_port()
        except (OSError, ValueError) as error:
            raise self._not_started(error) from error
        self._serving = True
        return port

    def stop(self, grace_s: float | None = None) -> None:
        """End it: give it ``grace_s`` to end by itself, as it does when no member is left, then make it."""
        if self._serving:
            self._wait(grace_s)
        self._close(self._process.stdin)  # the lifeline
        if not self._wait(_STOP_TIMEOUT_S):
            self._process.kill()
            self._process.wait()
        self._close(self._process.stdout)

    def _not_started(self, error: Exception) -> ServerStartError:
        self.stop(grace_s=0.0)
        return ServerStartError(
            f"the {self._name} did not start (exit code {self._process.returncode}): {error or 'no answer'}. "
            f"What it printed stands above{self._hint}"
        )

    def _wait(self, timeout_s: float | None) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read_port(self) -> int:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if select.select([stdout], [], [], 1.0)[0]:
                line = stdout.readline()
                if line != b"\n":
                    if not line.strip().isdigit():
                        raise OSError(line.decode().strip())
                    return int(line)
                deadline = time.monotonic() + START_TIMEOUT_S  # it gets on
        raise OSError(f"no answer within {START_TIMEOUT_S:.0f} s")

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # the other end is gone
                pass


@dataclass
class Job:
    """All that the process of a coordinator needs to know."""

    members: int
    host: str
    server_public: str
    server_secret: str
    worker_key: str
    hands_out_batches: bool = False
    record: str | None = None
    replay: str | None = None
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def recording(self) -> Recording:
        """What is recorded of the run, and replayed."""
        record, replay = (None if path is None else Path(path) for path in (self.record, self.replay))
        return Recording(record, replay)

    @property
    def server_keys(self) -> KeyPair:
        """Those of its socket."""
        return KeyPair(self.server_public, self.server_secret)


class CoordinatorProcess(ChildProcess):
    """The coordinator of a run whose ranks talk to each other directly: no torch in it, so it is there in a blink."""

    def __init__(self) -> None:
        super().__init__("lightning_stale.coordinator", "coordinator")

    def serve(
        self,
        members: int,
        host: str,
        credentials: Credentials,
        hands_out_batches: bool = False,
        recording: Recording | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> int:
        """Send the job, and return the port once it listens.

        Args:
            members: the number of ranks.
            host: the address to listen on.
            credentials: of the run.
            hands_out_batches: whether the ranks ask for batches.
            recording: what is recorded of the run, and replayed; ``None``: nothing.
            header: of the record.

        Raises:
            ServerStartError: if it does not come up.
        """
        keys, recording = credentials.server, recording or Recording()
        job = Job(
            members,
            host,
            keys.public,
            keys.secret,
            credentials.worker.public,
            hands_out_batches,
            None if recording.record is None else str(recording.record),
            None if recording.replay is None else str(recording.replay),
            dict(header or {}),
        )
        self.tell(json.dumps(asdict(job)).encode(), b"\n")
        return self.await_port()
