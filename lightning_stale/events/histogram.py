"""How often each value came, in a dict that stays small however large values get."""

from __future__ import annotations

from collections.abc import Mapping

_BITS = 6
_EXACT = 1 << _BITS
"""Values below it are counted as they are; of larger ones, the first bits say in which bucket they are."""


def bucket(value: int) -> int:
    """Return the smallest value that is counted with ``value``: itself below 64, and above that at most 3 % less.

    Example::

        >>> from lightning_stale.events.histogram import bucket
        >>> [bucket(value) for value in (0, 63, 64, 65, 1000)]
        [0, 63, 64, 64, 992]
    """
    shift = max(0, value.bit_length() - _BITS)
    return value >> shift << shift


def width(start: int) -> int:
    """Return how many values are counted in the bucket that begins at ``start``.

    Example::

        >>> from lightning_stale.events.histogram import width
        >>> width(5), width(992)
        (1, 16)
    """
    return 1 << max(0, start.bit_length() - _BITS)


def count(counts: dict[int, int], value: int) -> None:
    """Count ``value``."""
    place = value if value < _EXACT else bucket(value)
    counts[place] = counts.get(place, 0) + 1


def together(several: list[Mapping[int, int]]) -> dict[int, int]:
    """Return the sum of histograms, by value.

    Example::

        >>> from lightning_stale.events.histogram import together
        >>> together([{3: 1, 0: 2}, {3: 4}])
        {0: 2, 3: 5}
    """
    total: dict[int, int] = {}
    for counts in several:
        for value, times in counts.items():
            total[value] = total.get(value, 0) + times
    return dict(sorted(total.items()))
