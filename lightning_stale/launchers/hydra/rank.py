"""A further rank of a Hydra job: ``python -m lightning_stale.launchers.hydra.rank PARENT CONFIG (SCRIPT | -m MODULE)``.

Runs the user's app, whose ``@hydra.main`` calls its task function with the pickled config instead of composing one: no
sweep is started and no folder is made. Ends with the process ``PARENT``, rank 0 of the job.
"""

from __future__ import annotations

import runpy
import sys
import warnings

from hydra.core.utils import setup_globals

from lightning_stale.launchers.hydra.job import destroy_process_group
from lightning_stale.lifeline import end_with

_GRACE_S = 2.0
"""A rank that does not hang notices the broken connection, and ends with an error that says so."""


def main() -> None:
    """Run the app."""
    parent, config, *app = sys.argv[1:]
    end_with(int(parent), grace_s=_GRACE_S)
    setup_globals()  # the resolvers ${hydra:...} and ${now:...}, which a rerun does without
    warnings.filterwarnings("ignore", message="Experimental rerun CLI option")
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # of `-m`: the next ones are those of rank 0
    sys.argv[1:] = ["--experimental-rerun", config]
    try:
        if app[0] == "-m":
            runpy.run_module(app[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = app[0]
            runpy.run_path(app[0], run_name="__main__")
    finally:
        destroy_process_group()  # before the interpreter is: gloo now and then aborts at exit


if __name__ == "__main__":
    main()
