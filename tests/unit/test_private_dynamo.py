"""What stands in for torch's compiler in the parameter server, in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "LBFGS")
STEPS = """
import sys, torch
from lightning_stale.private import of_dynamo
if {postponed}:
    of_dynamo.postpone()
torch.manual_seed(1)
for name in {optimizers}:
    weights = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    optimizer = getattr(torch.optim, name)(weights, lr=0.1)
    def closure():
        optimizer.zero_grad()
        loss = sum((weight**2).sum() for weight in weights)
        loss.backward()
        return loss
    for _ in range(3):
        optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)
    print(name, [weight.tolist() for weight in weights])
print("sympy" in sys.modules, file=sys.stderr)
"""
COMPILE = """
import torch
from lightning_stale.private import of_dynamo
of_dynamo.postpone()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.5)
def step():
    weight.grad = torch.ones(2)
    optimizer.step()
step()
assert type(torch._dynamo).__name__ == "_StandIn"
double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
assert double(torch.ones(2)).tolist() == [2.0, 2.0]
import torch._dynamo.config
assert torch._dynamo.__file__ and torch._dynamo.config.cache_size_limit
step()
torch.compile(step, backend="eager")()
assert weight.tolist() == [-0.5, -0.5], weight
"""


SUBMODULES = """
import sys, torch
from lightning_stale.private import of_dynamo
of_dynamo.postpone()
import torch._dynamo.config, torch._dynamo.eval_frame
import torch._dynamo.debug_utils
assert torch._dynamo.__file__
assert torch._dynamo.output_graph.config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch._dynamo.eval_frame.OptimizedModule is torch._dynamo.OptimizedModule
assert not isinstance(torch._dynamo.config.__spec__.loader, of_dynamo._Submodules)
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-X", "lightning_stale_server", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.timeout(180)
def test_optimizers_step_alike_without_the_compiler() -> None:
    plain, postponed = (run(STEPS.format(postponed=value, optimizers=OPTIMIZERS)) for value in (False, True))
    assert postponed.returncode == plain.returncode == 0, plain.stderr + postponed.stderr
    assert plain.stdout == postponed.stdout
    assert len(plain.stdout.splitlines()) == len(OPTIMIZERS)
    assert (plain.stderr.strip(), postponed.stderr.strip()) == ("True", "False"), "it has cost nothing"


@pytest.mark.timeout(180)
def test_submodules_are_loaded_once() -> None:
    result = run(SUBMODULES)
    assert result.returncode == 0, result.stderr


@pytest.mark.timeout(180)
def test_who_compiles_gets_the_compiler() -> None:
    result = run(COMPILE)
    assert result.returncode == 0, result.stderr
