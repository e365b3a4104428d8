"""DSP: a model partitioned into blocks, each run and updated by a stage, from stale features and gradients.

``partition`` makes the blocks, a ``stage`` runs one, ``channels`` move ``values`` between them, ``divided`` is a model
of which each rank owns a part, and ``alike`` is what all ranks must have in common.
"""
