"""What a paradigm would make of a cluster: the coordinator, paradigms and leases of the strategies over given times.

No tensor is computed and no torch is imported: a million pushes of ten thousand workers take less than a minute.
"""

from __future__ import annotations

from lightning_stale.simulation.choice import Choice, choose
from lightning_stale.simulation.cluster import Cluster
from lightning_stale.simulation.ddp import run_ddp
from lightning_stale.simulation.log import read_log
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.run import run
from lightning_stale.simulation.setting import Setting, usual
from lightning_stale.simulation.step_times import StepTimes, draw

__all__ = [
    "Choice",
    "Cluster",
    "Outcome",
    "Setting",
    "StepTimes",
    "choose",
    "draw",
    "read_log",
    "run",
    "run_ddp",
    "usual",
]
