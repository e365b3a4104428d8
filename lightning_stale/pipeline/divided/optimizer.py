"""An optimizer of which a rank keeps the part that updates its own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stale.private.of_torch import tree_map


class DividedOptimizer:
    """The part of an optimizer that updates this rank's parameters.

    The user's one optimizer is built over the whole model, so that its param groups come out as they were meant; then
    each rank takes the others' parameters out of the groups (which may become empty), and nothing else. Indices of
    parameters are those of the whole optimizer, in checkpoints too.

    Args:
        optimizer: over the parameters of the whole model.
        names: by ``id`` of a parameter, its name in the model.
        own: the names that this rank owns.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], own: set[str]) -> None:
        self.optimizer = optimizer
        self._names = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for group, group_names in zip(optimizer.param_groups, self._names, strict=True):
            others = [p for p, name in zip(group["params"], group_names, strict=True) if name not in own]
            group["params"] = [p for p, name in zip(group["params"], group_names, strict=True) if name in own]
            for parameter in others:  # Adagrad has a state for each from the start
                optimizer.state.pop(parameter, None)
        flat = [name for group_names in self._names for name in group_names]
        self._indices = [index for index, name in enumerate(flat) if name in own]

    def state(self) -> dict[int, Any]:
        """Return the state of this rank's parameters, by their index in the whole optimizer."""
        return {self._indices[i]: values for i, values in self.optimizer.state_dict()["state"].items()}

    def complete(self, everyone: Sequence[Mapping[int, Any]]) -> dict[str, Any]:
        """Return the ``state_dict()`` of the whole optimizer, given :meth:`state` of every rank."""
        groups, start = [], 0
        for group, names in zip(self.optimizer.state_dict()["param_groups"], self._names, strict=True):
            groups.append({**group, "params": list(range(start, start + len(names)))})
            start += len(names)
        merged = {index: values for state in everyone for index, values in state.items()}
        return {"state": dict(sorted(merged.items())), "param_groups": groups}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Load a copy of this rank's part of the ``state_dict()`` of the whole optimizer."""
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**group, "params": mine["params"]} for group, mine in zip(state_dict["param_groups"], own, strict=True)
        ]
        state = state_dict["state"]
        local = {i: tree_map(_copied, state[index]) for i, index in enumerate(self._indices) if index in state}
        self.optimizer.load_state_dict({"state": local, "param_groups": groups})

    def join(self, model: nn.Module, everyone: Sequence[Mapping[int, Any]] | None) -> None:
        """Have all parameters of ``model`` in the groups again, and the state of ``everyone``, where it is given."""
        whole = None if everyone is None else self.complete(everyone)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [parameters[name] for name in names]
        if whole is not None:
            self.optimizer.load_state_dict(whole)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
