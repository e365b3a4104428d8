"""Looks at every push of a run that is recorded or replayed: is it the same, and is it the one that is asked for?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stale.events import Event, Fingerprint
from lightning_stale.parameter_server.fingerprints import fingerprint
from lightning_stale.parameter_server.store import ParameterStore, Push
from lightning_stale.recording.options import Recording
from lightning_stale.recording.turns import DiffersError, ReplayError, Turns


class UntilReachedError(ReplayError):
    """The update that was asked for has been made."""


@dataclass
class Inspector:
    """Writes the checksums of each push down, and compares them with those of the run that is replayed.

    Args:
        names: of the parameters of the store.
        record: is told of the checksums.
        until: stop after this update, and save what it was; ``None``: after none.
        file: where that is saved.
    """

    names: Sequence[str]
    record: Callable[[Event], None]
    until: int | None = None
    file: Path | None = None
    _steps: Counter[int] = field(default_factory=Counter)
    _asked_for: list[dict[str, Any]] = field(default_factory=list)  # the pushes of that update
    _before: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, recording: Recording, names: Sequence[str], record: Callable[[Event], None]) -> Inspector | None:
        """Return that of a run; ``None`` if it is neither recorded nor replayed."""
        if not recording.looks_at_pushes:
            return None
        replay, until = recording.replay, recording.until
        file = None if replay is None or until is None else replay.with_name(f"{replay.name}.update-{until}.pt")
        return cls(names, record, until, file)

    def look_at(self, push: Push, store: ParameterStore, turns: Turns, now: float) -> None:
        """Note a push, before it is applied.

        Raises:
            DiffersError: if in the record it was another one.
        """
        places, step = store.places(push.optimizer), self._steps[push.worker]
        self._steps[push.worker] += 1
        gradients = [push.gradients[p] if used else None for p, used in zip(places, push.used, strict=True)]
        mine = fingerprint(now, push.worker, gradients, push.options)
        self.record(mine)
        recorded = turns.expected(Fingerprint)
        if recorded is not None:
            self._compare(
                mine, recorded, places, f"rank {push.worker} in its step {step}, for update {store.version + 1}"
            )
        if self.until is not None and store.version + 1 == self.until:
            self._asked_for.append(self._describe(push, store, step))
            self._before = self._named(store.views)

    def note_update(self, store: ParameterStore) -> None:
        """Note that an update has been made.

        Raises:
            UntilReachedError: if it is the one that is asked for, which is saved by then.
        """
        if self.until is None or store.version < self.until or not self._asked_for or self.file is None:
            return
        pushes, self._asked_for = self._asked_for, []
        weights = {"before": self._before, "weights": self._named(store.views)}
        torch.save({"update": self.until, "pushes": pushes, **weights}, self.file)
        said = "; ".join(
            f"the push of rank {push['worker']} in its step {push['step']}, {push['staleness']} updates stale"
            f"{_what_is_not_finite(push['gradients'])}"
            for push in pushes
        )
        raise UntilReachedError(
            f"update {self.until} is made, as was asked for: {said}. Its gradients, and the weights before and "
            f"after it, are in {self.file}"
        )

    def _compare(self, mine: Fingerprint, recorded: Fingerprint, places: Sequence[int], where: str) -> None:
        if (mine.gradients, mine.parameters) != (recorded.gradients, recorded.parameters):
            pairs = zip(places, mine.parameters, recorded.parameters, strict=True)
            first = next((self.names[place] for place, one, other in pairs if one != other), "one of the parameters")
            raise DiffersError(
                f"the gradient that was pushed by {where}, is another one than in the record, first in {first!r}: "
                "something that the model computes, or the data, is not deterministic. Call seed_everything(SEED, "
                "workers=True) before all else, and write Trainer(deterministic=True)"
            )
        if mine.options != recorded.options:
            raise DiffersError(
                f"the gradient that was pushed by {where}, is that of the record, but the learning rate or another "
                "option of its optimizer is not: schedulers and callbacks must be as they were"
            )

    def _describe(self, push: Push, store: ParameterStore, step: int) -> dict[str, Any]:
        places = store.places(push.optimizer)
        return {
            "worker": push.worker,
            "step": step,
            "staleness": push.staleness,
            "optimizer": push.optimizer,
            "options": push.options,
            "gradients": {
                self.names[place]: push.gradients[place].clone()
                for place, used in zip(places, push.used, strict=True)
                if used
            },
        }

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in zip(self.names, tensors, strict=True)}


def _what_is_not_finite(gradients: dict[str, Tensor]) -> str:
    names = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f", not finite in {names[0]!r}{more}" if names else ""
