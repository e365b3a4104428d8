"""The order of the tests: the longest first, so that no process is at them when the others are out of work."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = vars(getattr(item, "module", object)).keys()  # what the test's file has of the harness
        return 0 if names & {"run_script", "script"} else 1 if names & {"run_workers", "workers"} else 2

    items.sort(key=place)  # stable: a file's tests stay together, for its fixtures


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what has been imported: it walks through that for longer than a test."""
    gc.freeze()
