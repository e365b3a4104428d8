"""One block with its queue: forward of batch n, backward of batch n - m (arXiv 1909.02625, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

Features = tuple[Any, ...]
"""The positional arguments of a block: tensors, or nested tuples, lists and dicts of tensors and plain values."""

Gradients = list[Tensor | None]
"""One entry per floating-point tensor among the flattened features; None where nothing depends on it."""


@dataclass(frozen=True)
class Block:
    """A module, and whether its result is a tuple of the next one's arguments (a traced model) or its one argument."""

    module: nn.Module
    spreads: bool = False

    def __call__(self, features: Features, weights: dict[str, Tensor] | None = None) -> Features:
        result = self.module(*features) if weights is None else functional_call(self.module, weights, features)
        return tuple(result) if self.spreads else (result,)


@dataclass
class _Pending:
    """A batch whose backward is still to come."""

    inputs: Features  # leaves of the graph that backward goes through
    outputs: Features | None = None  # with their graph; None: to be recomputed
    random_state: dict[str, Any] | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)  # those of the forward, if the graph has its own


class Stage:
    """Stage ``k`` of the pipeline: owns block ``k`` and what its backward still needs.

    Args:
        block: the block.
        staleness: ``m_k``.
        recompute: keep inputs only, and run the block again, with the weights of then, before the backward. ``False``:
            keep the graph of the forward over a copy of its weights; the update applies to the current ones.
        first: whether its inputs are data, which need no gradient.
        last: whether its result goes to the loss; its graph is kept, and ``staleness`` is 0.
        context: entered around each run of the block (autocast, say).
    """

    def __init__(
        self,
        block: Block,
        staleness: int,
        *,
        recompute: bool = True,
        first: bool = False,
        last: bool = False,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.block = block
        self.staleness = staleness
        self.recompute = recompute
        self.first = first
        self.last = last
        self._context = context
        self._pending: dict[int, _Pending] = {}
        self._mutates_inputs = True  # until the first forward has shown that it does not
        self._mutable_buffers: set[tuple[int, str]] | None = None  # likewise

    @property
    def pending(self) -> list[int]:
        """The batches whose backward is still to come, oldest first."""
        return list(self._pending)

    def forward(self, batch: int, features: Features) -> Features:
        """Run the block on ``features`` of ``batch``; return its result, detached unless this is the last stage."""
        inputs = tree_map(self._as_leaf, features)
        if self.staleness == 0:  # the backward follows before anything changes: its graph is the forward's
            outputs = self._run(inputs)
            self._pending[batch] = _Pending(inputs, outputs)
        elif self.recompute:
            pending = _Pending(inputs, random_state=_random_state(inputs))
            self._pending[batch] = pending
            with torch.no_grad(), self._buffers_kept():
                outputs = self._run(inputs)
        else:
            weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in self._parameters()}
            outputs = self._run(inputs, weights)
            self._pending[batch] = _Pending(inputs, outputs, weights=weights)
        return outputs if self.last else tree_map(partial(_sendable, own=self._memory()), outputs)

    def backward(self, batch: int, gradients: Gradients) -> Gradients:
        """Back-propagate ``gradients`` of the result of ``batch``; gradients of the parameters accumulate as usual.

        Returns:
            The gradients of the inputs.
        """
        pending = self._pending[batch]
        outputs = pending.outputs
        if outputs is None:
            with _replay(pending.random_state):
                outputs = self._run(pending.inputs)
        pairs = [
            (output, gradient)
            for output, gradient in zip(floating(outputs), gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        with torch.no_grad():
            for name, parameter in self._parameters() if pending.weights else ():
                gradient = pending.weights[name].grad
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return self.finish(batch)

    def finish(self, batch: int) -> Gradients:
        """Forget ``batch``, whose backward has run; return the gradients of its inputs."""
        return [tensor.grad for tensor in floating(self._pending.pop(batch).inputs)]

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.block.module.named_parameters())

    def _memory(self) -> set[int]:
        """Return where the parameters and buffers are, which change while the neighbour still has the features."""
        module = self.block.module
        return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    def _as_leaf(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(not self.first and value.is_floating_point())

    def _run(self, inputs: Features, weights: dict[str, Tensor] | None = None) -> Features:
        """Run the block; a copy of the inputs if it changes them in place, as a leading ``ReLU(inplace=True)`` does."""
        given = tree_map(_copied, inputs) if self._mutates_inputs else inputs
        before = [tensor._version for tensor in tensors(given)]
        with self._context():
            outputs = self.block(given, weights)
        changed = before != [tensor._version for tensor in tensors(given)]
        if changed and not self._mutates_inputs:
            raise RuntimeError(
                "a block changed its input in place, which it did not do for the first batch: make it do so "
                "always or never"
            )
        self._mutates_inputs = changed
        return outputs

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Undo what a forward does to the block's buffers (batch norm's statistics): the recompute will do it."""
        held = {
            (id(module), name): (module, buffer, buffer._version)
            for module in self.block.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        learnt = self._mutable_buffers
        copies = {key: buffer.clone() for key, (_, buffer, _) in held.items() if learnt is None or key in learnt}
        yield
        changed = set()
        for key, (module, buffer, version) in held.items():
            same = module._buffers[key[1]] is buffer and buffer._version == version
            if same and (key not in copies or torch.equal(buffer, copies[key])):  # batch norm leaves the version alone
                continue
            changed.add(key)
            if key not in copies:
                raise RuntimeError(
                    f"{type(module).__name__} changed its buffer {key[1]!r}, which it did not do for the first "
                    "batch: write DSPStrategy(recompute=False)"
                )
            module._buffers[key[1]] = buffer.copy_(copies[key])
        self._mutable_buffers = changed if learnt is None else learnt


def tensors(features: Any) -> list[Tensor]:
    """Return the tensors among flattened ``features``."""
    return [value for value in tree_flatten(features)[0] if isinstance(value, Tensor)]


def floating(features: Any) -> list[Tensor]:
    """Return the floating-point tensors among flattened ``features``: those that may have gradients."""
    return [tensor for tensor in tensors(features) if tensor.is_floating_point()]


def _sendable(value: Any, own: set[int]) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.clone() if value.untyped_storage().data_ptr() in own else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _random_state(inputs: Features) -> dict[str, Any]:
    devices = sorted({tensor.device.index for tensor in tensors(inputs) if tensor.device.type == "cuda"})
    return {"cpu": torch.get_rng_state(), "cuda": {index: torch.cuda.get_rng_state(index) for index in devices}}


@contextmanager
def _replay(state: dict[str, Any] | None) -> Iterator[None]:
    """Let dropout draw again what it drew in the forward; the present random state is kept."""
    assert state is not None
    with torch.random.fork_rng(devices=list(state["cuda"])):
        torch.set_rng_state(state["cpu"])
        for index, values in state["cuda"].items():
            torch.cuda.set_rng_state(values, index)
        yield


def check_disjoint(blocks: Sequence[Block], outside: Iterable[tuple[str, nn.Parameter]] = ()) -> None:
    """Refuse a parameter that two blocks share, or that a block shares with what lies outside of all blocks.

    Args:
        blocks: the blocks.
        outside: (name, parameter) of what the model holds outside of the module that was cut.

    Raises:
        ValueError: names it.
    """
    owner: dict[int, tuple[int, str]] = {}
    for k, block in enumerate(blocks):
        for name, parameter in block.module.named_parameters():
            first, other = owner.setdefault(id(parameter), (k, name))
            if first != k:
                raise ValueError(
                    f"blocks {first} and {k} share a parameter ({other!r} and {name!r}), and each block has its own "
                    f"optimizer: untie them (model.{name} = nn.Parameter(model.{other}.detach().clone()); for a "
                    "Hugging Face model tie_word_embeddings=False in its config), or choose a split that keeps both in "
                    "one block"
                )
    for name, parameter in outside:
        if id(parameter) in owner:
            k, other = owner[id(parameter)]
            raise ValueError(
                f"{name!r} is {other!r} of block {k}, and what lies outside of the blocks is the last stage's: make "
                "it part of the module that is cut, in the same block, or do not share it"
            )
