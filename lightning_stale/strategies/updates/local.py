"""Each rank's own optimizer takes the steps, and no other rank has these weights: nothing is to be exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_stale.strategies.updates.update import Training, Update


class LocalUpdate(Update):
    """A plain Trainer's."""

    def start(self, training: Training) -> None:
        self.running = True

    def after_batch(self) -> None:
        pass

    def meet(self, place: str) -> None:
        pass

    def state_dict(self) -> Mapping[str, Any] | None:
        return None

    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        pass

    def finish(self) -> None:
        self.running = False

    def release(self) -> None:
        self.running = False
