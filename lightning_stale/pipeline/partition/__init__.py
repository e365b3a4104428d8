"""How a model is *partitioned* into *blocks*, each of which a *stage* runs: one file per way of doing it.

``sequential`` takes an ``nn.Sequential`` apart where blocks of like cost start, or where the user says; ``traced`` any
module that torch.fx can follow, at the names of submodules; ``configured`` has the blocks from the user.
"""
