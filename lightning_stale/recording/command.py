"""``python -m lightning_stale replay``: what a record says of a fit, and that fit again, up to one of its updates."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning_stale.recording.log import UnreadableLogError, read
from lightning_stale.recording.options import REPLAY
from lightning_stale.recording.updates import RecordedUpdate, updates

PROGRAM = "python -m lightning_stale replay"


def main(arguments: Sequence[str]) -> int:
    """Say what is recorded; with a script, run it as the fit that is recorded. Return the exit status."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        usage="%(prog)s [-h] [--until UPDATE] RECORD [-- train.py ARGS]",
        description="Show what a record says (StaleSyncStrategy(record=True) writes it): of one update, which push it "
        "was, of whom and how stale. With the script that was recorded, run it as it ran then, bit for bit.",
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="the file")
    parser.add_argument(
        "--until", type=int, metavar="UPDATE", help="end with this update, and save its gradients and weights"
    )
    own = list(arguments)
    script: list[str] = []
    if "--" in own:
        own, script = own[: own.index("--")], own[own.index("--") + 1 :]
    asked = parser.parse_args(own)
    try:
        header, events = read(asked.record)
    except (OSError, UnreadableLogError) as error:
        parser.exit(1, f"{PROGRAM}: {error}\n")
    made = list(updates(events))
    by_worker = Counter(push.worker for update in made for push in update.pushes)
    print(f"{asked.record}: {header.get('paradigm', header.get('strategy'))}, {_what_was_made(made)}")
    print(f"(pushes: {', '.join(f'rank {worker} {count}' for worker, count in sorted(by_worker.items()))})")
    if asked.until is not None:
        if header.get("strategy") == "HPSGDStrategy":
            parser.exit(
                1,
                f"{PROGRAM}: --until {asked.until}: workers of HPSGDStrategy average, and push no updates to a server, "
                "one of which could be asked for: leave --until out, and stop where you want to in training_step\n",
            )
        found = next((update for update in made if update.number == asked.until), None)
        if found is None:
            parser.exit(1, f"{PROGRAM}: --until {asked.until}: the record has {_what_was_made(made)}\n")
        print(f"update {found.number}, after {found.at:.3f} s:")
        for push in found.pushes:
            print(f"  the push of {push}")
    return _run(asked.record, asked.until, script) if script else 0


def _what_was_made(made: Sequence[RecordedUpdate]) -> str:
    if not made:
        return "no updates"
    return f"updates {made[0].number} to {made[-1].number} in {made[-1].at:.1f} s"


def _run(record: Path, until: int | None, script: Sequence[str]) -> int:
    """Run ``script``, told to replay; return 0 if it has come to the update that was asked for."""
    told = str(record.absolute()) + ("" if until is None else f"\n{until}")
    saved = None if until is None else record.absolute().with_name(f"{record.name}.update-{until}.pt")
    if saved is not None:
        saved.unlink(missing_ok=True)
    sys.stdout.flush()
    code = subprocess.run([sys.executable, *script], env={**os.environ, REPLAY: told}, check=False).returncode
    if saved is None:
        return code
    if not saved.exists():
        print(f"{PROGRAM}: the fit has ended before update {until}; what it printed stands above", file=sys.stderr)
        return code or 1
    print(f"Update {until} is in {saved}: torch.load(FILE) has its gradients, and the weights before and after it")
    return 0
