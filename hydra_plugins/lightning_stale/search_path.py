"""Makes the groups ``trainer/strategy``, ``apply`` and ``adaptation``, and names, known to every Hydra app."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hydra_plugins.lightning_stale.names import register_names


class LightningStaleSearchPath(SearchPathPlugin):
    """Appends the packaged configs to the search path: an app's own configs of the same name go first.

    The folder is looked up, not imported: ``pkg://lightning_stale.conf`` would import ``lightning_stale``, and with it
    torch and Lightning, which every Hydra app in this environment would pay for with seconds at every start.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder ``lightning_stale/conf``, and have the names of the strategies known."""
        register_names()
        package = find_spec("lightning_stale")
        for folder in (package and package.submodule_search_locations) or ():
            if (Path(folder) / "conf").is_dir():
                search_path.append(provider="lightning-stale", path=f"file://{folder}/conf")
