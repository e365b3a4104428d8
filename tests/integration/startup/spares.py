"""Processes that are forked where Python would be started: a second of imports is saved each time.

A process of a test forks its *spares* as soon as it has imported lightning, and before it has done anything. They wait,
until this process starts a rank of its script or the process of a server: then one of them becomes it, as a child of
this one as the real one is, with the same pipes, environment and command line, and runs the same ``__main__``. Nothing
else is different: what is sent to it, when it ends and what is left of it. What is started beyond that is started for
real, and so is all in a script whose environment says ``LIGHTNING_STALE_TEST_GC=plain``.
"""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

SERVERS = ("lightning_stale.coordinator", "lightning_stale.parameter_server")
NAME_BYTES = 15
"""Of the name of a process."""
_MANY = 1 << 20


class Spare:
    """A process that waits to be told what it is; it ends with this one, and when it is let go.

    Args:
        others: those before it, whose sockets are none of its business.
    """

    def __init__(self, others: Sequence[Spare]) -> None:
        self._socket, its_end = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            for spare in (self, *others):
                spare._socket.close()
            _wait(its_end)
        its_end.close()

    def become(self, arguments: Sequence[str], environment: dict[str, str], streams: Sequence[int]) -> None:
        """Be what ``python`` would with these ``arguments`` and standard ``streams``."""
        what = pickle.dumps((list(arguments), environment, os.getcwd()))
        socket.send_fds(self._socket, [len(what).to_bytes(4, "big")], list(streams))
        self._socket.sendall(what)
        self._socket.close()

    def dismiss(self) -> None:
        """End it: it is not needed."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _wait(told: socket.socket) -> None:
    """Be told what to be, become it, and end."""
    size, streams, _, _ = socket.recv_fds(told, 4, 3)
    if not size:
        os._exit(0)
    what = b""
    while len(what) < int.from_bytes(size, "big"):
        what += told.recv(_MANY)
    told.close()
    arguments, environment, folder = pickle.loads(what)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            pass
    os._exit(code)


def _run(arguments: list[str]) -> int:
    """Run a script or module as ``__main__`` to its end, and what is to be done at it; return the exit code."""
    code = 0
    try:
        if "-m" in arguments:
            module, *sys.argv[1:] = arguments[arguments.index("-m") + 1 :]
            with open("/proc/self/comm", "w") as name:  # noqa: PTH123
                name.write(module.rpartition(".")[2][:NAME_BYTES])
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = arguments
            for name in [name for name, module in sys.modules.items() if _is_in_the_midst(name, module)]:
                del sys.modules[name]
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        if "-m" in arguments:  # no thread of an interpreter that ends runs; and what the error holds open, stays so
            os._exit(1)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _is_in_the_midst(name: str, module: Any) -> bool:
    """Whether ``module`` was being imported when this process was forked, and is not lightning, which was done."""
    return name != "lightning" and getattr(getattr(module, "__spec__", None), "_initializing", False)


def keep(count: int) -> None:
    """Have the first ``count`` servers and ranks that this process starts forked, now; call it before all else."""
    spares: list[Spare] = []
    for _ in range(count):
        spares.append(Spare(spares))
    start, owner = subprocess.Popen._execute_child, os.getpid()  # type: ignore[attr-defined]

    def execute_child(
        self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
        errread: int, errwrite: int, *others: Any,
    ) -> None:  # fmt: skip
        plain = executable is None and preexec_fn is None and cwd is None and not shell and not pass_fds
        if not (spares and os.getpid() == owner and plain and _is_ours(args)):
            start(
                self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others,
            )  # fmt: skip
            return
        spare, streams = spares.pop(), (p2cread, c2pwrite, errwrite)
        own = (number if end == -1 else end for number, end in enumerate(streams))
        spare.become(args[1:], dict(os.environ if env is None else env), list(own))
        self.pid, self._child_created = spare.pid, True
        for its, mine in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if mine != -1:
                os.close(its)
        self._closed_child_pipe_fds = True

    def dismiss() -> None:
        while spares and os.getpid() == owner:
            spares.pop().dismiss()

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    atexit.register(dismiss)


def _is_ours(args: Any) -> bool:
    """Whether it is a server's process, or one more rank of this script."""
    if not isinstance(args, list) or args[0] != sys.executable:
        return False
    return ("-m" in args and args[-2] in SERVERS) or args[1:] == [os.path.abspath(sys.argv[0]), *sys.argv[1:]]
