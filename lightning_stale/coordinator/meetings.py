"""Who has come to a meeting point, and whether it is the same one for all."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class DifferentPlacesError(RuntimeError):
    """All workers wait, and not at the same place."""


class Meeting:
    """Collects workers until all have come.

    Example::

        >>> from lightning_stale.coordinator.meetings import Meeting
        >>> meeting = Meeting()
        >>> meeting.arrive(1, "validation", "step 4")
        >>> meeting.open(awaited={0, 1})
        []
        >>> meeting.arrive(0, "validation", "step 4")
        >>> meeting.open(awaited={0, 1})
        [0, 1]
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[str, str]] = {}
        self._regions: dict[int, str] = {}

    @property
    def waiting(self) -> Collection[int]:
        """Who has come."""
        return self._places.keys()

    def arrive(self, rank: int, place: str, detail: str, region: str = "") -> None:
        """Note that ``rank`` is at ``place``, in ``region``; ``detail`` is what an error says besides."""
        self._places[rank] = (place, detail)
        self._regions[rank] = region

    def leave(self, rank: int) -> None:
        """``rank`` is gone, wherever it was."""
        self._places.pop(rank, None)
        self._regions.pop(rank, None)

    def open(self, awaited: Collection[int], finished: Collection[int] = (), interrupted: bool = False) -> list[int]:
        """Return all who have come if these are all who are ``awaited``, and nobody otherwise.

        Args:
            awaited: who will come.
            finished: who should have come as well, and has left for good.
            interrupted: whether what they do is void, as somebody was lost in it: who has noticed has come at once, and
                others later. They are to be in one region at least.

        Raises:
            DifferentPlacesError: if all have come and the places differ, with all places and details.
        """
        if not self._places or not self._places.keys() >= set(awaited):
            return []
        regions = set(self._regions.values())
        together = interrupted and len(regions) == 1 and "" not in regions
        if finished or (not together and len({place for place, _ in self._places.values()}) > 1):
            raise DifferentPlacesError(different_places(self._places, finished))
        ranks = sorted(self._places)
        self._places.clear()
        self._regions.clear()
        return ranks


def different_places(places: Mapping[int, tuple[str, str]], finished: Collection[int] = ()) -> str:
    """Return what is wrong with ``places`` (place and detail by rank) and ``finished`` ranks, and the cure."""
    described = "; ".join(
        [f"rank {rank} is at {place} ({detail})" for rank, (place, detail) in sorted(places.items())]
        + [f"rank {rank} has finished" for rank in sorted(finished)]
    )
    return (
        f"the workers met at different places: {described}. All ranks must come to the same ones: with different "
        "numbers of batches per rank, validate and save at the end of an epoch (val_check_interval=1.0, "
        "every_n_train_steps=None) and end with max_epochs instead of max_steps, or give every rank as many "
        "batches (Trainer(limit_train_batches=...)); set trainer.should_stop on all ranks or none."
    )
