"""How worker processes are started, and ended with the Hydra job that has started them."""

from lightning_stale.launchers.hydra.task import hydra_job
from lightning_stale.launchers.script import ScriptLauncher
from lightning_stale.launchers.summary import SummaryLauncher

__all__ = ["ScriptLauncher", "SummaryLauncher", "hydra_job"]
