"""Cut the body of a LightningModule as the user has asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_stale.pipeline import partition
from lightning_stale.pipeline.stage import Block
from lightning_stale.private import of_lightning
from lightning_stale.strategies.compiled import compile_blocks

Split = Literal["params", "time"] | Sequence[int] | Sequence[str]


def cut_model(trainer: Trainer, stages: int, name: str | None, split: Split) -> tuple[nn.Module, list[Block]]:
    """Return the module that the blocks replace, and the blocks.

    Args:
        trainer: with the LightningModule, and the data for ``split="time"``.
        stages: the number of blocks.
        name: of the module to cut.
        split: how.

    Raises:
        CannotCutError: names the module, and the alternatives.
        MisconfigurationException: if ``configure_stages()`` and ``stages`` disagree.
    """
    module = trainer.lightning_module
    configured = getattr(module, "configure_stages", None)
    if callable(configured):
        made = configured()
        if len(made) != stages:
            raise MisconfigurationException(
                f"configure_stages() returned {len(made)} blocks for {stages} stages: write stages={len(made)}, or "
                f"return {stages}"
            )
        owner: nn.Module = module
        path, blocks = "", [Block(block) for block in made]
    else:
        owner, path, blocks = _cut_body(trainer, stages, name, split)
    compile_blocks(module, path, blocks)
    return owner, blocks


def _cut_body(trainer: Trainer, stages: int, name: str | None, split: Split) -> tuple[nn.Module, str, list[Block]]:
    module = trainer.lightning_module
    names = [start for start in split if isinstance(start, str)] if not isinstance(split, str) else []
    path, names = partition.resolve(module, name, names)
    body = partition.unwrap(module.get_submodule(path))
    if names:
        if len(names) != stages - 1:
            raise partition.CannotCutError(
                f"split={names} makes {len(names) + 1} blocks for {stages} stages: write {stages - 1} names, or "
                f"stages={len(names) + 1}"
            )
        cut = partition.cut_traced(body, names, path)
        return body, path, [Block(block, spreads=k < stages - 1) for k, block in enumerate(cut)]
    if not isinstance(body, nn.Sequential):
        raise partition.CannotCutError(
            f"{path} is a {type(body).__name__}, not an nn.Sequential: write the names of the submodules that start a "
            f"block, e.g. split={[child for child, _ in body.named_children()][1:stages]}, or define configure_stages()"
        )
    starts = _starts(trainer, body, stages, split)
    return body, path, [Block(block) for block in partition.cut_sequential(body, starts)]


def _starts(trainer: Trainer, body: nn.Sequential, stages: int, split: Split) -> list[int]:
    if split == "params" or (split == "time" and trainer.state.fn != TrainerFn.FITTING):  # no training data to time
        return partition.cut_points([partition.count_parameters(layer) for layer in body], stages)
    if split == "time":
        starts: Any = None
        if trainer.is_global_zero:  # measured once, on what the body is given for the first batch
            example = of_lightning.first_input(trainer, body)
            costs = partition.measure_layers(body, example, context=trainer.precision_plugin.forward_context)
            starts = partition.cut_points(costs, stages)
        return list(trainer.strategy.broadcast(starts))
    return partition.check_cut_points([int(start) for start in split], len(body), stages)


def outside(model: nn.Module, owner: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters of ``model`` that are not those of ``owner``, the module that was cut."""
    within = [path for path, module in model.named_modules(remove_duplicate=False) if module is owner]
    return [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not any(path == "" or name.startswith(f"{path}.") for path in within)
    ]


def positional(owner: nn.Module) -> Callable[..., tuple[Any, ...]]:
    """Return what brings the arguments of a call of ``owner`` into the order of its signature, defaults included."""
    signature = inspect.signature(type(owner).forward)

    def bind(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        bound = signature.bind(owner, *args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[1:]

    return bind
