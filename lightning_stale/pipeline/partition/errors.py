"""What is said of a model that cannot be partitioned."""

from __future__ import annotations


class PartitionError(ValueError):
    """A model that cannot be partitioned as asked."""
