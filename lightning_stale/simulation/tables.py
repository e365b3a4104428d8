"""How the commands show a time."""

from __future__ import annotations


def as_time(seconds: float) -> str:
    """Return a time with its unit, three digits of it.

    Example::

        >>> from lightning_stale.simulation.tables import as_time
        >>> as_time(0.0612), as_time(61.8), as_time(22680.0)
        ('61.2 ms', '61.8 s', '6.3 h')
    """
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"
