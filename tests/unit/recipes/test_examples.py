"""The examples in the docstrings of the recipes run."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys

import pytest

from tests.integration.harness import ROOT, STARTUP

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("models", "data")
    for path in (ROOT / "recipes" / folder).glob("[a-z]*.py")
)


@pytest.mark.parametrize("name", ["recipes.classifier", *MODULES])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_they_are_found() -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    examples = [test for module in modules for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(examples) >= 9


def test_nothing_needs_torchvision() -> None:
    code = "import sys; sys.modules['torchvision'] = None; import recipes.classifier, recipes.data, recipes.models"
    path = os.pathsep.join([str(ROOT), str(STARTUP)])  # spares it what lightning imports for some metrics
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)
