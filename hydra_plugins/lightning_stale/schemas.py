"""Schemas of the packaged configs: a typo or a wrong type is an error when the config is composed, in any Hydra app.

Names, types and defaults are those of the constructors (a test compares them). Hydra loads this module before it
composes anything; the YAML files in ``lightning_stale/conf`` name their schemas in their defaults lists. Errors show
the names of these classes. What Lightning's Trainer takes itself (accelerator, precision, plugins) is not repeated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Minutes:
    """A ``datetime.timedelta``."""

    _target_: str = "datetime.timedelta"
    minutes: float = 10.0


@dataclass
class StaleStrategy:
    """What all strategies take."""

    _convert_: str = "all"
    start_method: str = "popen"
    process_group_backend: str | None = None
    timeout: Minutes = field(default_factory=Minutes)


@dataclass
class BSP:
    """``lightning_stale.BSP``."""

    _target_: str = "lightning_stale.BSP"


@dataclass
class ASP:
    """``lightning_stale.ASP``."""

    _target_: str = "lightning_stale.ASP"


@dataclass
class SSP:
    """``lightning_stale.SSP``."""

    _target_: str = "lightning_stale.SSP"
    threshold: int = 3


@dataclass
class DSSP:
    """``lightning_stale.DSSP``."""

    _target_: str = "lightning_stale.DSSP"
    lower: int = 3
    upper: int = 15
    enforce_upper: bool = True


@dataclass
class BoundedDelay:
    """``lightning_stale.BoundedDelay``."""

    _target_: str = "lightning_stale.BoundedDelay"
    delay: int | str | None = None
    lower: int | None = None
    upper: int | None = None
    waiting: float = 0.02


@dataclass
class StaleSyncStrategy(StaleStrategy):
    """``lightning_stale.StaleSyncStrategy``."""

    _target_: str = "lightning_stale.StaleSyncStrategy"
    transport: str = "auto"
    apply: Any = "plain"  # a name, or a rule; the group `apply` has one schema for each
    data: str = "auto"
    elastic: Any = False  # or true, or a node whose _target_ is lightning_stale.Elastic
    record: bool | str | Path = False
    replay: str | Path | None = None


@dataclass
class BSPStrategy(StaleSyncStrategy):
    """With its paradigm."""

    paradigm: BSP = field(default_factory=BSP)


@dataclass
class ASPStrategy(StaleSyncStrategy):
    """With its paradigm."""

    paradigm: ASP = field(default_factory=ASP)


@dataclass
class SSPStrategy(StaleSyncStrategy):
    """With its paradigm."""

    paradigm: SSP = field(default_factory=SSP)


@dataclass
class DSSPStrategy(StaleSyncStrategy):
    """With its paradigm."""

    paradigm: DSSP = field(default_factory=DSSP)


@dataclass
class BoundedDelayStrategy(StaleSyncStrategy):
    """With its paradigm."""

    paradigm: BoundedDelay = field(default_factory=BoundedDelay)


@dataclass
class Ringmaster:
    """``lightning_stale.Ringmaster``."""

    _target_: str = "lightning_stale.Ringmaster"
    R: int | None = None


@dataclass
class DelayCompensated:
    """``lightning_stale.DelayCompensated``."""

    _target_: str = "lightning_stale.DelayCompensated"
    lambda_: float | None = None
    adaptive: bool = True


@dataclass
class Dana:
    """``lightning_stale.Dana``."""

    _target_: str = "lightning_stale.Dana"
    momentum: float = 0.9


@dataclass
class Scaled:
    """``lightning_stale.Scaled``."""

    _target_: str = "lightning_stale.Scaled"


@dataclass
class HPSGDStrategy(StaleStrategy):
    """``lightning_stale.HPSGDStrategy``."""

    _target_: str = "lightning_stale.HPSGDStrategy"
    interval: int | str = "auto"
    outer_optimizer: Any = None
    merge: str = "hpsgd"
    data: str = "auto"
    record: bool | str | Path = False
    replay: str | Path | None = None


@dataclass
class DSPStrategy(StaleStrategy):
    """``lightning_stale.DSPStrategy``."""

    _target_: str = "lightning_stale.DSPStrategy"
    stages: int | None = None
    staleness: Any = "dsp"  # a name, or a list of integers
    queues: list[int] | None = None
    recompute: bool = True
    module: str | None = None
    split: Any = "params"  # a name, or a list
    gather: str = "rank0"


@dataclass
class AdaptedSSP(SSP):
    """``lightning_stale.DSSP.from_ssp``; a subclass, so that it fits nothing but SSP."""

    _target_: str = "lightning_stale.DSSP.from_ssp"
    threshold: int = MISSING  # stays what it is
    upper: int = 15
    enforce_upper: bool = True


@dataclass
class ThresholdSchedule:
    """``lightning_stale.ThresholdSchedule``."""

    _target_: str = "lightning_stale.ThresholdSchedule"
    _convert_: str = "all"
    milestones: Any = None  # epoch: thresholds; the constructor checks them (OmegaConf cannot merge into a typed null)
    monitor: str | None = None
    mode: str = "min"
    patience: int = 3
    factor: float = 0.5
    minimum: int = 1


SCHEMAS = {
    "bsp": BSPStrategy,
    "asp": ASPStrategy,
    "ssp": SSPStrategy,
    "dssp": DSSPStrategy,
    "bounded-delay": BoundedDelayStrategy,
    "hpsgd": HPSGDStrategy,
    "dsp": DSPStrategy,
    "apply_ringmaster": Ringmaster,
    "apply_delay_compensated": DelayCompensated,
    "apply_dana": Dana,
    "apply_scaled": Scaled,
    "adaptation_dssp": AdaptedSSP,
    "adaptation_schedule": ThresholdSchedule,
}

for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(_name, _schema, group="lightning_stale/schema", provider="lightning-stale")
