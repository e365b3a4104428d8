"""The schema of Lightning's own strategy, which takes any keyword and passes it on: typos fail with the config."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class DDPStrategy:
    """``lightning.pytorch.strategies.DDPStrategy``, as far as the recipes need it."""

    _target_: str = "lightning.pytorch.strategies.DDPStrategy"
    start_method: str = "popen"
    process_group_backend: str | None = None
    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False


ConfigStore.instance().store("ddp", DDPStrategy, group="recipes/schema", provider="recipes")
