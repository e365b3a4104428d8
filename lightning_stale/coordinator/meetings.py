"""Who has come to a meeting point, and whether it is the same one for all."""

from __future__ import annotations

from collections.abc import Mapping


class DifferentPlacesError(RuntimeError):
    """All workers wait, and not at the same place."""


class Meeting:
    """Collects workers until all have come.

    Args:
        world_size: the number of workers.

    Example::

        >>> meeting = Meeting(world_size=2)
        >>> meeting.arrive(1, "validation", "step 4")
        []
        >>> meeting.arrive(0, "validation", "step 4")
        [0, 1]
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._places: dict[int, tuple[str, str]] = {}

    def arrive(self, rank: int, place: str, detail: str) -> list[int]:
        """Note that ``rank`` is at ``place``; return all ranks if it was the last, and nobody otherwise.

        Raises:
            DifferentPlacesError: if it was the last and the places differ, with all places and details.
        """
        self._places[rank] = (place, detail)
        if len(self._places) < self._world_size:
            return []
        if len({place for place, _ in self._places.values()}) > 1:
            raise DifferentPlacesError(self._describe())
        ranks = sorted(self._places)
        self._places.clear()
        return ranks

    def _describe(self) -> str:
        return different_places({rank: f"{place} ({detail})" for rank, (place, detail) in self._places.items()})


def different_places(places: Mapping[int, str]) -> str:
    """Return what is wrong with ``places``, by rank, and the cure."""
    described = "; ".join(f"rank {rank} is at {place}" for rank, place in sorted(places.items()))
    return (
        f"the workers met at different places: {described}. All ranks must come to the same ones: with different "
        "numbers of batches per rank, validate and save at the end of an epoch (val_check_interval=1.0, "
        "every_n_train_steps=None) and end with max_epochs instead of max_steps, or give every rank as many "
        "batches (Trainer(limit_train_batches=...)); set trainer.should_stop on all ranks or none."
    )
