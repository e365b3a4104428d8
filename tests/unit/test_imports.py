"""Imports point one way, what must start in a blink imports no torch, and only ``private/`` reaches into others' code.

Exceptions are data, each with its reason; one that is not needed any more fails.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim import SGD

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_stale"

LAYERS = [
    {"private", "elastic", "failures", "lifeline", "supervisor", "topology"},  # leaves
    {"paradigms"},
    {"coordinator", "transport", "events", "recording"},
    {"parameter_server", "averaging", "data", "pipeline", "launchers"},
    {"strategies", "callbacks", "simulation", "plots"},
    {"__main__"},
]
"""From below. A package may import those of layers below its own; of its own layer, those that SIBLINGS names."""

SIBLINGS: dict[tuple[str, str], str] = {
    ("coordinator", "transport"): "the loop around the state machine and its clients send messages (it does not: PURE)",
    ("coordinator", "events"): "the state machine records what it decides",
    ("coordinator", "recording"): "the loop around it takes messages in turn",
    ("recording", "events"): "what is recorded",
    ("callbacks", "strategies"): "a callback reads a strategy's summary and changes its paradigm",
}
CYCLE_EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Imports that are left out when cycles are looked for."""

NO_TORCH = {"paradigms", "coordinator", "events", "recording", "simulation", "plots"}
HEAVY = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "numpy"}
MAY_IMPORT = {  # of the rest of the world, besides Python's own modules; who is not here may import anything
    "paradigms": set[str](),
    "events": set[str](),
    "failures": set[str](),
    "lifeline": set[str](),
    "supervisor": set[str](),
    "coordinator": {"msgpack", "zmq"},
    "recording": {"msgpack"},
    "simulation": {"rich", "matplotlib"},
    "plots": {"matplotlib"},
}
PURE = [
    "paradigms",
    "events",
    "failures",
    *(
        f"coordinator.{name}"
        for name in ("coordinator", "membership", "meetings", "leases", "round_leases", "messages")
    ),
    "pipeline.schedule",
    "pipeline.staleness",
    *(f"simulation.{name}" for name in ("run", "ddp", "cluster", "step_times", "outcome", "setting", "choice")),
    *(f"simulation.pipeline.{name}" for name in ("channel", "engine", "run", "setting", "stage_times", "outcome")),
    *(f"simulation.{name}" for name in ("averaging", "recorded", "pipeline.choice")),
]
"""Modules and packages of decisions: no socket, no clock, no thread, no torch."""
PURE_STANDARD = {
    "__future__",
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "random",  # of a given seed
    "statistics",
    "traceback",
    "typing",
}
NO_LIGHTNING = {"pipeline", "averaging", "transport"}  # algorithms and transports know nothing of Lightning

DOCUMENTED = {"os._exit", "sys._getframe", "sys._xoptions"}
"""Names of Python's own that begin with an underscore, and are in its documentation."""
NAMED_TUPLES = {"_make", "_fields", "_replace", "_asdict", "_field_defaults"}  # documented too

MADE_BY_METACLASSES = {"_abc_impl", "_is_protocol", "_backward_cls"}

_SEAM = "Lightning's only seam for a strategy's launcher"
_MODEL_SEAM = "Lightning's seam for what a strategy does to the model before its optimizers are made"
PRIVATE_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("strategies.base", "StaleStrategy._configure_launcher"): _SEAM,
    ("strategies.base", "super()._configure_launcher"): _SEAM,
    ("strategies.base", "StaleStrategy._setup_model"): _MODEL_SEAM,
    ("strategies.dsp", "DSPStrategy._setup_model"): _MODEL_SEAM,
    ("strategies.dsp", "super()._setup_model"): _MODEL_SEAM,
}


class Import(NamedTuple):
    importer: str
    target: str
    line: int


class Use(NamedTuple):
    """Of a name that begins with an underscore."""

    module: str
    name: str
    expression: str
    line: int


@functools.lru_cache
def sources() -> Mapping[str, ast.Module]:
    """Every module of the package, and of what Hydra loads, by its name."""
    found = {}
    for path in sorted([*ROOT.glob(f"{PACKAGE}/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports_of(name: str, tree: ast.AST, modules: Mapping[str, ast.Module]) -> Iterator[Import]:
    """Everything that a module imports: within functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in modules else str(node.module), node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            (argument, *_) = node.args
            if isinstance(argument, ast.Constant):
                yield Import(name, argument.value, node.lineno)


def all_imports() -> list[Import]:
    modules = sources()
    return [found for name, tree in modules.items() for found in imports_of(name, tree, modules)]


def inner_imports() -> list[Import]:
    return [found for found in all_imports() if found.target.split(".")[0] == PACKAGE]


def unit(module: str) -> str:
    """``lightning_stale.pipeline.stage`` belongs to ``pipeline``; the package itself, the whole API, to ``""``."""
    return [*module.split("."), ""][1] if module.startswith(PACKAGE) else module


def _short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


# --- one direction ----------------------------------------------------------------------------------------------------


def wrong_directions(imports: list[Import]) -> dict[tuple[str, str], list[str]]:
    """Imports that LAYERS forbids, by (importer, imported), with where."""
    layer_of = {name: level for level, names in enumerate(LAYERS) for name in names}
    wrong: dict[tuple[str, str], list[str]] = {}
    for found in imports:
        importer, target = unit(found.importer), unit(found.target)
        if importer == target or importer in ("", "__main__", "hydra_plugins.lightning_stale.names"):  # above all
            continue
        for name in (importer, target):
            assert name in layer_of, f"{found}: write {name!r} into a layer of LAYERS"
        below = layer_of[importer] > layer_of[target]
        if not below and (importer, target) not in SIBLINGS:
            wrong.setdefault((importer, target), []).append(f"{found.importer}:{found.line}")
    return wrong


def cycles(imports: list[Import]) -> list[list[str]]:
    """Modules that import each other, directly or over others (Tarjan)."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.importer, set()).add(found.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1 or node in graph.get(node, ()):
                result.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return result


def test_imports_point_one_way() -> None:
    assert wrong_directions(inner_imports()) == {}


def test_siblings_and_exceptions_are_needed() -> None:
    edges = {(unit(found.importer), unit(found.target)) for found in inner_imports()}
    assert SIBLINGS.keys() - edges == set(), "delete them"
    edges = {(_short(found.importer), _short(found.target)) for found in inner_imports()}
    assert CYCLE_EXCEPTIONS.keys() - edges == set(), "delete them"


def test_every_unit_has_one_place() -> None:
    units = [name for names in LAYERS for name in names]
    assert sorted(units) == sorted({unit(name) for name in sources() if name.startswith(f"{PACKAGE}.")})


def test_no_module_imports_itself_over_others() -> None:
    imports = [found for found in inner_imports() if (_short(found[0]), _short(found[1])) not in CYCLE_EXCEPTIONS]
    assert cycles(imports) == []
    assert cycles([Import(unit(a), unit(b), 0) for a, b, _ in inner_imports() if unit(a) != unit(b)]) == []


def test_what_points_the_wrong_way_is_found() -> None:
    """In a function and for type checking as well."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lightning_stale.strategies import dsp\n"
        "def f():\n    import lightning_stale.pipeline.stage"
    )
    found = [
        found
        for found in imports_of("lightning_stale.transport.new", tree, sources())
        if found.target.startswith(PACKAGE)
    ]
    assert set(wrong_directions(found)) == {("transport", "strategies"), ("transport", "pipeline")}
    assert cycles([*found, Import("lightning_stale.pipeline.stage", "lightning_stale.transport.new", 1)]) == [
        ["lightning_stale.pipeline.stage", "lightning_stale.transport.new"]
    ]


# --- who imports what of the rest of the world ------------------------------------------------------------------------


def test_who_may_import_what_of_others() -> None:
    wrong = []
    for found in all_imports():
        root, importer = found.target.split(".")[0], unit(found.importer)
        if root == PACKAGE or root in sys.stdlib_module_names:
            continue
        allowed = MAY_IMPORT.get(importer)
        if (allowed is not None and root not in allowed) or (importer in NO_LIGHTNING and root.startswith("lightning")):
            wrong.append(found)
    assert wrong == []


def _is_pure(module: str) -> bool:
    return any(_short(module) == name or _short(module).startswith(f"{name}.") for name in PURE)


def test_decisions_are_made_without_sockets_clocks_and_threads() -> None:
    wrong = [
        found
        for found in all_imports()
        if _is_pure(found.importer) and not _is_pure(found.target) and found.target.split(".")[0] not in PURE_STANDARD
    ]
    assert wrong == []
    assert [name for name in PURE if not any(_short(module) == name for module in sources())] == [], "it has moved"


IMPORT = """
import sys

class Refuse:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in {heavy}:
            raise RuntimeError(fullname + " is imported")

sys.meta_path.insert(0, Refuse())
import importlib
for name in {names}:
    importlib.import_module(name)
"""


def import_without_torch(names: list[str], path: Path = ROOT) -> str:
    """Import ``names`` in a fresh interpreter, marked as the server's is; return what went wrong."""
    done = subprocess.run(
        [sys.executable, "-X", "lightning_stale_server", "-c", IMPORT.format(heavy=HEAVY, names=names)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stderr


def test_what_must_start_in_a_blink_imports_no_torch() -> None:
    names = [name for name in sources() if unit(name) in NO_TORCH and not name.endswith("__main__")]
    assert {unit(name) for name in names} == NO_TORCH
    assert import_without_torch(names) == ""


def test_an_import_of_torch_over_others_is_found(tmp_path: Path) -> None:
    (tmp_path / "over_others.py").write_text("from lightning_stale.transport import groups\n")
    assert "torch is imported" in import_without_torch(["over_others"], tmp_path)


# --- who reaches into other libraries ---------------------------------------------------------------------------------

PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def own_names() -> set[str]:
    """Names with an underscore that the package defines: functions, classes, attributes of its objects, variables."""
    found: set[str] = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
    return {name for name in found if PRIVATE.fullmatch(name)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@functools.lru_cache
def others_names() -> frozenset[str]:
    """Names with an underscore that objects of Lightning and torch have, which objects of ours may have too."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True)
    parameter = nn.Parameter(Tensor([1.0]))
    objects = [parameter, nn.Linear(1, 1), nn.LSTM(1, 1), SGD([parameter], lr=0.1), LightningModule(), trainer]
    objects += [LightningOptimizer(SGD([parameter], lr=0.1)), torch.compile(nn.Linear(1, 1)), trainer.strategy]
    loop = trainer.fit_loop
    objects += [_MultiProcessingLauncher(trainer.strategy, "fork"), loop, loop.epoch_loop, loop.epoch_loop.val_loop]
    return frozenset(name for one in objects for name in dir(one) if PRIVATE.fullmatch(name))


def uses_of(name: str, tree: ast.AST, own: set[str]) -> Iterator[Use]:
    """Every use of a private name that is, or may be, another library's.

    ``self._x`` and ``other._x`` are ours if the package defines ``_x`` somewhere; ``other._x`` not even then if objects
    of Lightning or torch have one too. A string may be for ``getattr``, or for a ``__dict__``.
    """
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGE):
            for alias in node.names:
                if any(PRIVATE.fullmatch(part) for part in (*str(node.module).split("."), alias.name)):
                    yield Use(name, alias.name, f"{node.module}.{alias.name}", line)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if any(PRIVATE.fullmatch(part) for part in alias.name.split(".")):
                    yield Use(name, alias.name, alias.name, line)
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and node.attr not in NAMED_TUPLES:
            expression = ast.unparse(node)
            ours = node.attr in own and (_is_self(node.value) or node.attr not in others_names())
            if not ours and expression not in DOCUMENTED:
                yield Use(name, node.attr, expression, line)
        elif isinstance(node, ast.Constant) and node.value in others_names() - own:
            yield Use(name, node.value, repr(node.value), line)


def foreign_uses() -> list[Use]:
    own = own_names()
    return [use for name, tree in sources().items() if unit(name) != "private" for use in uses_of(name, tree, own)]


def overrides() -> list[Use]:
    """Private attributes of other libraries' classes that classes of ours replace."""
    found = []
    for name in sources():
        if not name.startswith(PACKAGE) or unit(name) == "private" or name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for _, kind in inspect.getmembers(module, lambda value: isinstance(value, type)):
            others = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in (PACKAGE, "builtins")]
            if kind.__module__ != name:
                continue
            found += [
                Use(name, attribute, f"{kind.__name__}.{attribute}", 0)
                for attribute in vars(kind)
                if PRIVATE.fullmatch(attribute) and any(attribute in vars(base) for base in others)
            ]
    return [use for use in found if use.name not in MADE_BY_METACLASSES]


def test_only_private_reaches_into_other_libraries() -> None:
    found = [*foreign_uses(), *overrides()]
    needed = {(_short(use.module), use.expression) for use in found}
    wrong = [use for use in found if (_short(use.module), use.expression) not in PRIVATE_EXCEPTIONS]
    assert [f"{use.module}:{use.line}: {use.expression}" for use in wrong] == [], "move it to lightning_stale/private/"
    assert set(PRIVATE_EXCEPTIONS) - needed == set(), "delete them"


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map",
        "from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher",
        "import torch._dynamo",
        "version = tensor._version",
        "class Mine(Trainer):\n    def f(self):\n        return self._accelerator_connector",
        "setattr(loop, '_skip_backward', True)",
        "vars(module).pop('_compiled_call_impl')",
        "hasattr(module, '_orig_mod')",
    ],
)
def test_a_reach_is_found(code: str) -> None:
    assert len(list(uses_of("new", ast.parse(code), own_names()))) == 1
