"""The order of the tests, the longest first, so that no process is at them alone at the end; and no seeds are left."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.integration.startup import lean_imports

# Two threads of each process, on the cores that all processes share, mostly wait for each other: 40 s instead of 3.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; for what the tests start too
_THRESHOLDS = gc.get_threshold()
gc.set_threshold(*_THRESHOLDS[:2], 1000)  # or else it walks dozens of times through what the tests import
lean_imports.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = vars(getattr(item, "module", object)).keys()  # what the test's file has of the harness
        return 0 if names & {"run_script", "script"} else 1 if names & {"run_workers", "workers"} else 2

    items.sort(key=place)  # stable: a file's tests stay together, for its fixtures


def pytest_collection_finish() -> None:
    """From here on, the garbage collector is as ever, and leaves alone what has been imported."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


@pytest.fixture(autouse=True)
def no_seed_is_left() -> Iterator[None]:
    """What ``seed_everything`` leaves in the environment orders the samples of every later Trainer, in scripts too."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("PL_SEED_WORKERS", None)
