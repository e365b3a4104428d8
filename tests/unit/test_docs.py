"""The commands, configs, links, names and figures of the README and the pages are those of this repository."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig

import lightning_stale
from benchmarks import pages
from docs.docstrings import as_markdown
from lightning_stale.__main__ import main as lightning_stale_main
from lightning_stale.simulation.command import add_arguments
from lightning_stale.simulation.pipeline import command as pipeline_command
from recipes import schemas  # noqa: F401 - of the configs
from tests.pages import PAGES, ROOT, Snippet, anchors, commands, links, snippets

BASH = [snippet for snippet in snippets("bash") if snippet.name is None]
YAML = [snippet for snippet in snippets("yaml") if snippet.name is None]
WIDEST = 84
"""Characters of code that fit beside the menus of a screen of 1400 pixels (docs/style.css)."""

NOT_OURS = {"export", "docker", "mount", "srun", "torchrun"}
"""Commands that are looked at as shell only, but for the names in them that are ours."""


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", BASH, ids=str)
def test_commands(snippet: Snippet, tmp_path: Path) -> None:
    parsed = subprocess.run(["bash", "-n"], input=snippet.code, text=True, capture_output=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    for command in commands(snippet):
        check_command(shlex.split(command), tmp_path)


def check_command(words: list[str], folder: Path) -> None:
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", what]:
            extras = re.findall(r"[\w-]+", what.partition("[")[2])
            assert what.startswith(".")
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        case ["python", "recipes/train.py", *arguments]:
            for overrides in jobs(arguments):
                with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                    check_config(compose("train", ["output=somewhere", *overrides]))
        case ["python", "app.py", *arguments]:
            for overrides in jobs(arguments):
                check_config(compose_app(folder, overrides))
        case ["python", "-m", "lightning_stale", "run", "--max-restarts", count, script, *_]:
            assert count.isdigit()
            assert script == "train.py", "the reader's"
        case ["python", "-m", "lightning_stale", "simulate", "pipeline", *arguments]:
            parser = argparse.ArgumentParser(exit_on_error=False)
            pipeline_command.add_arguments(parser)
            parser.parse_args(arguments)
        case ["python", "-m", "lightning_stale", "simulate", *arguments]:
            parser = argparse.ArgumentParser(exit_on_error=False)
            add_arguments(parser)
            parser.parse_args(arguments)
        case ["python", "-m", "lightning_stale", "join", _, "--secret", _, "--", "train.py", *_]:
            with pytest.raises(SystemExit) as ended:
                lightning_stale_main(words[3:])
            assert ended.value.code == 1, "its secret cannot be read here; 2 is for arguments that it does not know"
        case ["python", "-m", "lightning_stale", "replay", *_]:
            with pytest.raises(SystemExit) as ended:
                lightning_stale_main(words[3:])
            assert ended.value.code == 1, "its record cannot be read here; 2 is for arguments that it does not know"
        case ["python", "recipes/compare.py", "outputs/quickstart" | "outputs/2026-01-31/12-00-00"]:
            pass
        case [program, *_] if program in NOT_OURS:
            for variable in re.findall(r"LIGHTNING_\w+", " ".join(words)):
                assert any(variable in path.read_text() for path in (ROOT / "lightning_stale").rglob("*.py"))
        case _:
            raise AssertionError(f"say in check_command() how {' '.join(words)!r} is checked")


def jobs(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of every job of a command line; of a sweep, each of its jobs."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    assert set(flags) <= {"-m", "--help"}
    overrides = [argument for argument in arguments if argument not in flags]
    if "-m" not in flags:
        return [overrides]
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)
    return [list(job) for batch in batches for job in batch if not any(o.startswith("hydra.") for o in job)] or [[]]


def check_config(config: DictConfig) -> None:
    """See that what was composed can be made."""
    strategy = config.trainer.strategy
    if isinstance(strategy, str):
        assert strategy in StrategyRegistry
    else:
        instantiate(strategy)
    for callback in (config.get("callbacks") or {}).values():
        assert "_target_" in callback


APP = """
defaults:
  - _self_
  - trainer: default
"""

TRAINER = """
_target_: lightning.Trainer
strategy: ddp
"""


def compose_app(folder: Path, overrides: list[str], config: str = APP) -> DictConfig:
    """Compose an app of a reader's."""
    (folder / "trainer").mkdir(exist_ok=True)
    (folder / "trainer" / "default.yaml").write_text(TRAINER)
    (folder / "config.yaml").write_text(config)
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", overrides)


def test_a_sweep_is_checked_job_by_job() -> None:
    assert jobs(["-m", "a=1,2", "b=x,y"]) == [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", YAML, ids=str)
def test_configs(snippet: Snippet, tmp_path: Path) -> None:
    config = compose_app(tmp_path, [], snippet.code)
    check_config(config)
    assert instantiate(config.trainer.strategy).paradigm.thresholds == {"lower": 2, "upper": 9}


# --- names ------------------------------------------------------------------------------------------------------------


def test_strategies_of_the_tables() -> None:
    """Names are registered, and what they are made with is what the name stands for."""
    rows = re.findall(r'^\| `"([\w-]+)"` \| `([^`]+)` \|', (ROOT / "docs" / "strategies.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["ddp", "bsp", "ssp", "dssp", "asp", "bounded-delay", "hpsgd", "dsp"]
    for name, made in rows[1:]:
        strategy, expected = StrategyRegistry.get(name), eval(made, vars(lightning_stale).copy())
        assert repr(getattr(strategy, "paradigm", strategy)) == repr(expected)
    readme = re.findall(r'^\| \[?`"([\w-]+)"`', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(readme) == sorted(name for name, _ in rows)


def test_everything_public_has_its_place_in_the_api() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: lightning_stale\.(\w+)$", re.sub(r"<!--.*?-->", "", pages, flags=re.DOTALL), re.MULTILINE)
    assert set(lightning_stale.__all__) - set(shown) == set()


def test_paths() -> None:
    """A path that a page names exists."""
    named = re.compile(r"`((?:docs|conf|recipes|benchmarks|tests|lightning_stale)/[\w/.-]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}"


def test_the_map_of_the_house() -> None:
    """What is in it is there, and no folder of the package is left out."""
    page = (ROOT / "docs" / "contributing.md").read_text()
    drawn = set(re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE))
    assert {path for path in drawn if not (ROOT / "lightning_stale" / path).exists()} == set()
    assert {f"{path.parent.name}/" for path in (ROOT / "lightning_stale").glob("*/__init__.py")} <= drawn


# --- links and figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Those of the README too, which ``make docs`` does not see."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), target
        assert anchor == "" or anchor.startswith("lightning_stale.") or anchor in anchors(other), target


def test_docstrings_become_markdown() -> None:
    """Of Google's style with Sphinx's words, as they are in the package."""
    docstring = (
        "See :class:`~a.b.C` and :meth:`d`::\n\nReturns:\n    ``{1: 2}``: all.\n\nExample::\n\n    >>> 1\n    1\n"
    )
    assert as_markdown(docstring, "dict[int, int]") == (
        "See `C` and `d`:\n\nReturns:\n    dict[int, int]: ``{1: 2}``: all.\n\n"
        "**Example**\n\n```python\n>>> 1\n1\n```\n"
    )


@pytest.mark.parametrize("script", ["concepts", "house"])
def test_figures_are_those_that_the_scripts_draw(script: str) -> None:
    module = f"docs.figures.{script}"
    drawn = importlib.import_module(module).figures()
    for name, figure in drawn.items():
        kept = (ROOT / "docs" / "figures" / f"{name}.svg").read_text()
        assert kept == str(figure), f"{name}.svg is not what {module} draws: run python -m {module}"


def test_figures_in_tables_are_those_that_were_measured() -> None:
    """And none of the tables is left out."""
    found = []
    for page in PAGES:
        text = page.read_text()
        assert pages.with_results(text) == text, f"{page.name}: run python benchmarks/pages.py"
        found += [name for _, name in pages.MARKED.findall(text)]
    assert sorted(found) == sorted(pages.TABLES)


def test_code_does_not_run_off_a_wide_screen() -> None:
    long = [f"{snippet}: {line}" for snippet in snippets() for line in snippet.code.splitlines() if len(line) > WIDEST]
    assert not long, "\n".join(long)
