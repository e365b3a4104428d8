"""Who takes part: every rank once, and nobody speaks for a rank that has been given up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One joining of a rank: the next one is of another generation."""

    rank: int
    generation: int
    process: int


class Membership:
    """The ranks that are awaited, present or gone.

    Args:
        expected: the ranks that a run starts with.

    Example::

        >>> from lightning_stale.coordinator.membership import Membership
        >>> membership = Membership(range(2))
        >>> first = membership.join(1, process=4711)
        >>> first.generation, sorted(membership.awaited), sorted(membership.present)
        (1, [0, 1], [1])
        >>> membership.remove(1)
        >>> again = membership.join(1, process=4712)
        >>> membership.speaks(1, first.generation), membership.speaks(1, again.generation)
        (False, True)
    """

    def __init__(self, expected: range) -> None:
        self._expected = set(expected)  # and have not joined yet
        self._present: dict[int, Member] = {}
        self._generations = dict.fromkeys(expected, 0)
        self.finished: set[int] = set()
        """Who has left by itself, and has not joined anew."""

    @property
    def present(self) -> dict[int, Member]:
        """Who is here, by rank."""
        return self._present

    @property
    def awaited(self) -> set[int]:
        """Whom a meeting waits for: who is here, and who has never been."""
        return self._expected | self._present.keys()

    @property
    def over(self) -> bool:
        """Whether all have been here, and are gone."""
        return not self._expected and not self._present

    def check(self, rank: int) -> None:
        """Raise ``ValueError`` if ``rank`` is none of this run."""
        if rank not in self._generations:
            raise ValueError(f"rank {rank} is none of this run")

    def further(self) -> int:
        """Return a rank that nobody has had."""
        rank = len(self._generations)
        self._generations[rank] = 0
        return rank

    def join(self, rank: int, process: int) -> Member:
        """Let ``rank`` take part, for the first time or anew.

        Raises:
            ValueError: if it is no rank of this run, or is here.
        """
        self.check(rank)
        if rank in self._present:
            raise ValueError(f"a second connection for rank {rank}")
        self._expected.discard(rank)
        self.finished.discard(rank)
        self._generations[rank] += 1
        self._present[rank] = Member(rank, self._generations[rank], process)
        return self._present[rank]

    def speaks(self, rank: int, generation: int) -> bool:
        """Whether what is said as ``generation`` of ``rank`` counts."""
        return rank in self._present and self._present[rank].generation == generation

    def remove(self, rank: int) -> None:
        """``rank`` is gone; what its generation may still say counts no more."""
        del self._present[rank]
