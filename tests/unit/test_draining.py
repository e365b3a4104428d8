"""Which steps follow when a pipeline drains: as many batches per step as in training, and a last one for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_stale.strategies.draining import Draining


class Notes:
    """An optimizer, and a pipeline with so many backwards left."""

    def __init__(self, left: int) -> None:
        self.left, self.noted = left, list[str]()

    def drain(self, step: Callable[[], None]) -> None:
        for _ in range(self.left):
            self.noted.append("backward")
            step()

    def restart(self) -> None:
        self.noted.append("restart")

    def zero_grad(self) -> None:
        self.noted.append("zero")

    def step(self) -> None:
        self.noted.append("step")


def drained(left: int, group: int, since_step: int) -> list[str]:
    notes: Any = Notes(left)
    draining = Draining(notes, notes.step)
    draining.note_backward()
    draining.note_step()
    for _ in range(since_step):
        draining.note_backward()
    draining.drain(notes, group)
    return notes.noted


@pytest.mark.parametrize(
    ("left", "group", "since_step", "noted"),
    [
        (2, 1, 0, ["zero", "backward", "step", "zero", "backward", "step", "zero"]),
        (1, 2, 1, ["backward", "step", "zero"]),
        (1, 2, 0, ["zero", "backward", "step", "zero"]),
        (3, 2, 1, ["backward", "step", "zero", "backward", "backward", "step", "zero"]),
        (0, 3, 2, ["step", "zero"]),
    ],
)
def test_steps(left: int, group: int, since_step: int, noted: list[str]) -> None:
    assert drained(left, group, since_step) == noted


def test_forgotten_batches_are_in_no_step() -> None:
    notes: Any = Notes(0)
    draining = Draining(notes, notes.step)
    draining.note_backward()
    draining.forget_batches()
    draining.drain(notes, 1)
    assert notes.noted == ["restart", "zero"]
