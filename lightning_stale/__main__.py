"""``python -m lightning_stale run | join | replay | simulate``: a script until it succeeds, a fit that runs or ran."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from lightning_stale.launchers.replacements import JOIN
from lightning_stale.recording import command as recording
from lightning_stale.simulation import command as simulation
from lightning_stale.supervisor import become_supervisor
from lightning_stale.transport import invitation, secret
from lightning_stale.transport.introduction import Introduction
from lightning_stale.transport.invitation import Invitation, NotInvitedError
from lightning_stale.transport.secret import SecretError


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked for; to join, find the fit and become the script, which takes part as a further worker."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["run"]:
        become_supervisor(given[1:])
    if given[:1] == ["replay"]:
        sys.exit(recording.main(given[1:]))
    if given[:1] == ["simulate"]:
        sys.exit(simulation.main(given[1:]))
    parser = argparse.ArgumentParser(
        "python -m lightning_stale",
        description="Join an elastic fit that runs (StaleSyncStrategy(elastic=True)) as a further worker, from this "
        "host or another one. Rank 0 prints the whole command when training starts.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run a script, and again when it fails, from its newest checkpoint")
    commands.add_parser("replay", help="what is recorded of a fit, and that fit again, bit for bit")
    commands.add_parser(
        "simulate", help="what each paradigm would make of a cluster, or of a pipeline, from step times"
    )
    join = commands.add_parser("join", help="join an elastic fit that runs")
    join.add_argument("address", metavar="HOST:PORT", help="of rank 0, as it has printed it")
    join.add_argument(
        "--secret", type=Path, required=True, metavar="FILE", help="which lets in; only you may be able to read it"
    )
    join.add_argument(
        "--local-rank",
        type=int,
        default=0,
        metavar="N",
        help="which of the devices of this host that the script asks for to train on (default: the first)",
    )
    join.add_argument("script", nargs="+", metavar="train.py ARGS", help="or -m MODULE ARGS: the same as on rank 0")
    options = parser.parse_args(given)
    try:
        environment = _environment(options.address, options.secret, options.local_rank)
    except (NotInvitedError, SecretError, ValueError) as error:
        parser.exit(1, f"{parser.prog} join: {error}\n")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *options.script], environment)  # noqa: S606


def _environment(address: str, file: Path, local_rank: int) -> dict[str, str]:
    """Return the environment of one who joins, after a look whether it will be let in.

    Raises:
        ValueError: if ``address`` is none.
        NotInvitedError: if there is no fit to join.
        SecretError: if it is not the one that ``file`` lets in.
    """
    parts = re.fullmatch(r"(.+):(\d+)", address)
    if parts is None or int(parts[2]) > 65535:
        raise ValueError(f"{address!r} is no address: write HOST:PORT as rank 0 has printed it, e.g. 10.0.0.1:29500")
    if local_rank < 0:
        raise ValueError(f"--local-rank {local_rank}: write the number of a device of this host, from 0")
    found = secret.read_from(file)
    os.environ[secret.VARIABLE] = found
    host, port = parts[1], int(parts[2])
    store = invitation.connect(host, port)
    fit = Invitation.read(store)
    try:
        Introduction(store, fit.run, rank=-1, others=0).accept()
    except SecretError as error:
        raise SecretError(
            f"--secret {file} is not of the fit that runs at {address}: name the file that its rank 0 has printed"
        ) from error
    of_further = {"LOCAL_RANK": str(local_rank), "NODE_RANK": "1", "RANK": "1", JOIN: "-1"}
    seed = {} if fit.seed is None else {"PL_GLOBAL_SEED": fit.seed}
    return {**os.environ, "MASTER_ADDR": host, "MASTER_PORT": str(port), **of_further, **seed}


if __name__ == "__main__":
    main()
