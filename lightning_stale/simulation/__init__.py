"""What a paradigm would make of a cluster: the coordinator, paradigms and leases of the strategies over given times.

No tensor is computed and no torch is imported: a million pushes of ten thousand workers take less than a minute.
"""

from __future__ import annotations

from lightning_stale.simulation.choice import Choice, choose
from lightning_stale.simulation.cluster import Cluster
from lightning_stale.simulation.ddp import run_ddp
from lightning_stale.simulation.log import read_log
from lightning_stale.simulation.outcome import Outcome
from lightning_stale.simulation.pipeline.choice import PipelineChoice, choose_pipeline
from lightning_stale.simulation.pipeline.log import read_stage_log
from lightning_stale.simulation.pipeline.outcome import PipelineOutcome
from lightning_stale.simulation.pipeline.run import Costs, run_pipeline
from lightning_stale.simulation.pipeline.setting import (
    DSPSetting,
    FlushingSetting,
    PipelineSetting,
    parse_pipeline,
    usual_pipelines,
)
from lightning_stale.simulation.pipeline.stage_times import StageTimes, draw_stages
from lightning_stale.simulation.recorded import RecordedTimes, step_times_of
from lightning_stale.simulation.run import run
from lightning_stale.simulation.setting import AveragingSetting, Setting, parse_setting, usual
from lightning_stale.simulation.step_times import StepTimes, draw

__all__ = [
    "AveragingSetting",
    "Choice",
    "Cluster",
    "Costs",
    "DSPSetting",
    "FlushingSetting",
    "Outcome",
    "PipelineChoice",
    "PipelineOutcome",
    "PipelineSetting",
    "RecordedTimes",
    "Setting",
    "StageTimes",
    "StepTimes",
    "choose",
    "choose_pipeline",
    "draw",
    "draw_stages",
    "parse_pipeline",
    "parse_setting",
    "read_log",
    "read_stage_log",
    "run",
    "run_ddp",
    "run_pipeline",
    "step_times_of",
    "usual",
    "usual_pipelines",
]
