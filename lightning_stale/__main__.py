"""``python -m lightning_stale simulate ...``."""

from __future__ import annotations

import sys

from lightning_stale.simulation import command as simulation

_USAGE = "usage: python -m lightning_stale simulate [--help]"


def main() -> int:
    """Hand what is asked for to who does it."""
    match sys.argv[1:]:
        case ["simulate", *arguments]:
            return simulation.main(arguments)
        case ["-h" | "--help"]:
            print(_USAGE)
            return 0
        case arguments:
            print(f"{_USAGE}\n{' '.join(arguments[:1]) or 'a command'!r}: write simulate", file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
