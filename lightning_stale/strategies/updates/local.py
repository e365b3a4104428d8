"""Each rank's own optimizer takes the steps, and no other rank has these weights: nothing is to be exchanged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning_stale.events import Elapsed
from lightning_stale.strategies.updates.update import Training, Update


class LocalUpdate(Update):
    """A plain Trainer's."""

    def __init__(self) -> None:
        self._training: Training | None = None
        self._training_since: float | None = None

    def start(self, training: Training) -> None:
        self._training, self._training_since = training, None
        self.running = True

    def before_batch(self) -> None:
        """Let the time from here to the end of the next meeting count as training."""
        if self._training_since is None:
            self._training_since = time.perf_counter()

    def after_batch(self) -> None:
        pass

    def meet(self, place: str) -> None:
        since, self._training_since = self._training_since, None
        if self._training is not None and since is not None:
            now = time.perf_counter()
            self._training.record(Elapsed(now, now - since))

    def state_dict(self) -> Mapping[str, Any] | None:
        return None

    def load_state_dict(self, entry: Mapping[str, Any] | None) -> None:
        pass

    def finish(self) -> None:
        self.release()

    def release(self) -> None:
        self.running = False
        self._training = None
