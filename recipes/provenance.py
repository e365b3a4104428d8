"""What is kept with a run, so that it can be understood and repeated: config, code and versions."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

PACKAGES = ("torch", "lightning", "lightning-stale", "hydra-core", "torchmetrics", "numpy")


def save_provenance(config: DictConfig, folder: Path) -> None:
    """Write ``config.yaml`` (resolved), ``provenance.json``, and ``uncommitted.diff`` if there is any."""
    state, diff = git_state(Path(__file__).parent)
    about = {"command": sys.argv, "host": platform.node(), "git": state, "versions": versions()}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    (folder / "provenance.json").write_text(json.dumps(about, indent=2))
    if diff:
        (folder / "uncommitted.diff").write_text(diff, encoding="utf-8")


def versions() -> dict[str, str | None]:
    """Return the versions of Python, CUDA and what matters of the packages."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # on the path, but not installed
            found[package] = None
    return found


def git_state(folder: Path) -> tuple[dict[str, Any], str]:
    """Return commit, branch and changed files of the repository that ``folder`` is in, and the changes themselves.

    Where there is none, the first has an ``error`` that says so.
    """
    git = shutil.which("git")
    if git is None:
        return {"error": "git is not installed"}, ""

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode(errors="replace")

    try:
        state = {"commit": ask("rev-parse", "HEAD").strip(), "branch": ask("branch", "--show-current").strip()}
        changed = ask("status", "--porcelain").splitlines()
        return state | {"dirty": bool(changed), "changed": changed}, ask("diff", "HEAD")
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        return {"error": f"no git state: {(said or str(error)).strip()}"}, ""
