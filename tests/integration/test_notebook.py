"""A notebook that is executed: further ranks are forked, under names of their own; one device simply runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.harness import run_script

CELLS = [
    """
import torch
torch.set_num_threads(2)  # as on a larger machine: the ranks are forked from a process with a pool of threads
from lightning_stale import DSPStrategy
from tests.integration.models import Regression, assert_same, loader, trainer, weights

def fit(devices, strategy, model):
    t = trainer(devices, strategy, max_steps=6)
    t.fit(model, loader())
    return t.strategy.summary()
""",
    """
torch.randn(500, 500) @ torch.randn(500, 500)
virtual, alone = Regression(), Regression()
print("virtual", len(fit(1, DSPStrategy(stages=2), virtual)["stages"]), "alone", fit(1, "dssp", alone)["updates"])
""",
    """
for name in ("dssp", "dsp", "hpsgd"):
    try:
        trainer(2, name)
    except Exception as error:
        print(f"refused: {error}")
""",
    """
model = Regression()
print("pushes", fit(2, "dssp_notebook", model)["updates"])
moved = not torch.equal(model.net[0].weight, Regression().net[0].weight)
print("again", fit(2, "dssp_notebook", model)["updates"], moved)
""",
    """
print("rounds", fit(2, "hpsgd_notebook", Regression())["workers"][1]["steps"])
pipeline = Regression()
print("stages", len(fit(2, "dsp_notebook", pipeline)["stages"]))
assert_same(weights(pipeline), weights(virtual))
""",
]

EXECUTE = f"""
import nbformat
from nbclient import NotebookClient

cells = [nbformat.v4.new_code_cell(cell) for cell in {CELLS!r}]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=150, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("text", ""), end="")
"""


@pytest.mark.timeout(220)
def test_a_notebook_trains_with_all_strategies(tmp_path: Path) -> None:
    """And the harness sees to it that no process is left."""
    data = tmp_path / "jupyter"
    ended = run_script(EXECUTE, tmp_path, timeout=200, env={"JUPYTER_DATA_DIR": str(data), "OMP_NUM_THREADS": "2"})
    assert ended.returncode == 0, ended.output
    for line in ("virtual 2 alone 6", "pushes 12", "again 12 True", "rounds 6", "stages 2"):
        assert line in ended.output, ended.output
    for name in ("dssp", "dsp", "hpsgd"):
        assert f"Trainer(strategy='{name}_notebook')" in ended.output
    assert ended.output.count("refused: a notebook has no script") == 3
