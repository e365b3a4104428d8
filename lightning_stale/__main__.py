"""``python -m lightning_stale run --max-restarts 3 train.py ARGS``: a script, and again when it fails."""

from __future__ import annotations

import argparse
import sys

from lightning_stale.supervisor import become_supervisor


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["run"]:
        become_supervisor(given[1:])
    parser = argparse.ArgumentParser("python -m lightning_stale")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run a script, and again when it fails, from its newest checkpoint")
    parser.parse_args(given)


if __name__ == "__main__":
    main()
