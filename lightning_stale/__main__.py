"""``python -m lightning_stale run --max-restarts 3 train.py ARGS``: a script, and again when it fails."""

from __future__ import annotations

import os
import sys

from lightning_stale.supervisor import flags_of_python

_USAGE = "usage: python -m lightning_stale run [--max-restarts N] [-m] SCRIPT ...\n"


def main() -> None:
    """Become the process that supervises: the one that has come here has imported torch, which that one does without.

    Raises:
        SystemExit: with the usage, for anything but ``run``.
    """
    match sys.argv[1:]:
        case ["run", *arguments]:
            light = [sys.executable, *flags_of_python(), "-X", "lightning_stale_server"]
            os.execv(sys.executable, [*light, "-m", "lightning_stale.supervisor", *arguments])  # noqa: S606
        case ["-h" | "--help"]:
            print(_USAGE, end="")
        case arguments:
            raise SystemExit(f"{_USAGE}{' '.join(arguments[:1]) or 'a command'!r}: write run, and the script to run")


if __name__ == "__main__":
    main()
