"""Reaches into private parts of torchmetrics (read in 1.9); a test fails when one of them moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors


def gather_through(collective: Callable[[Callable[[], None]], None]) -> Callable[[], None]:
    """Let every metric gather its states in ``collective``, which may call it again; return what undoes it.

    Those of a process group of their own are left alone.
    """
    plain: Any = Metric._sync_dist

    def sync_dist(self: Metric, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        if process_group is not None or self.process_group is not None:
            plain(self, dist_sync_fn, process_group)
            return

        def gather() -> None:
            for name, state in (self._cache or {}).items():  # as before the first call
                setattr(self, name, state)
            plain(self, dist_sync_fn, process_group)

        collective(gather)

    Metric._sync_dist = sync_dist  # type: ignore[method-assign]

    def undo() -> None:
        Metric._sync_dist = plain  # type: ignore[method-assign]

    return undo
