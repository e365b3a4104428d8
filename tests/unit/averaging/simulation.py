"""Ranks in one process whose interleaving a seed decides: threads of which one at a time has its turn.

Delays are turns that a rank does not get, so a run is fast, repeatable, and a rank that waits for ever is found out at
once: nobody could have the next turn.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stale.averaging.rounds import Reducer


class Stopped(BaseException):
    """Ends a rank after another one has failed."""


class Simulation:
    """``size`` ranks; ``speeds`` are how likely each is to have the next turn."""

    def __init__(self, size: int, seed: int, speeds: Sequence[float] | None = None) -> None:
        self.size = size
        self.random = random.Random(seed)
        self.speeds = list(speeds or [1.0] * size)
        self.sums: list[dict[int, list[Tensor]]] = []  # by number; by rank: what it has brought
        self.launched = [0] * size
        self._ready: dict[int, Callable[[], bool]] = {}
        self._batons = [threading.Semaphore(0) for _ in range(size)]
        self._moderator = threading.Semaphore(0)
        self._results: dict[int, Any] = {}
        self._errors: list[BaseException] = []

    def run(self, program: Callable[[int, SimulatedReducer], Any]) -> list[Any]:
        """Run ``program(rank, reducer)`` on all ranks; return the results by rank.

        Raises:
            AssertionError: if all ranks that are left wait for each other.
        """
        threads = [threading.Thread(target=self._main, args=(rank, program), daemon=True) for rank in range(self.size)]
        for thread in threads:
            self._ready[len(self._ready)] = lambda: True
            thread.start()
        try:
            while self._ready:
                able = [rank for rank, ready in self._ready.items() if ready()]
                assert able, f"ranks {sorted(self._ready)} wait for ever, after {self.launched} launches"
                (rank,) = self.random.choices(able, [self.speeds[rank] for rank in able])
                self._give_turn(rank)
                if self._errors:
                    raise self._errors[0]
        finally:
            self._errors.append(Stopped())
            for rank in list(self._ready):
                self._give_turn(rank)
            for thread in threads:
                thread.join()
        return [self._results[rank] for rank in range(self.size)]

    def pause(self, rank: int, until: Callable[[], bool] = lambda: True) -> None:
        """Let others have their turns."""
        self._ready[rank] = until
        self._moderator.release()
        self._batons[rank].acquire()
        if self._errors:
            raise Stopped

    def _give_turn(self, rank: int) -> None:
        self._batons[rank].release()
        self._moderator.acquire()

    def _main(self, rank: int, program: Callable[[int, SimulatedReducer], Any]) -> None:
        self._batons[rank].acquire()
        try:
            if not self._errors:
                self._results[rank] = program(rank, SimulatedReducer(self, rank))
        except Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            del self._ready[rank]
            self._moderator.release()


class SimulatedReducer(Reducer):
    """Sums that arrive at random moments after all ranks have launched them; until then the tensors hold nonsense."""

    def __init__(self, simulation: Simulation, rank: int) -> None:
        self._simulation, self._rank = simulation, rank
        self._tensors: list[Tensor] | None = None
        self._arrived = False

    def launch(self, tensors: Sequence[Tensor]) -> None:
        assert self._tensors is None, "launched while another sum is in flight"
        simulation, number = self._simulation, self._simulation.launched[self._rank]
        simulation.launched[self._rank] += 1
        if number == len(simulation.sums):
            simulation.sums.append({})
        brought = [tensor.clone() for tensor in tensors]
        for others in simulation.sums[number].values():
            assert [(t.shape, t.dtype) for t in others] == [(t.shape, t.dtype) for t in brought], "mismatched sums"
        simulation.sums[number][self._rank] = brought
        self._tensors, self._arrived = list(tensors), False
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**31))
        simulation.pause(self._rank)

    def done(self) -> bool:
        self._simulation.pause(self._rank)
        self._arrived = self._arrived or (self._complete() and self._simulation.random.random() < 0.5)
        return self._arrived

    def wait(self) -> None:
        assert self._tensors is not None, "nothing to wait for"
        self._simulation.pause(self._rank, until=self._complete)
        for place, tensor in enumerate(self._tensors):
            tensor.zero_()
            for brought in self._sum().values():
                tensor.add_(brought[place])
        self._tensors = None

    def _sum(self) -> dict[int, list[Tensor]]:
        return self._simulation.sums[self._simulation.launched[self._rank] - 1]

    def _complete(self) -> bool:
        return len(self._sum()) == self._simulation.size
