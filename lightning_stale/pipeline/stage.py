"""One block with its queue: forward of batch n, backward of batch n - m (arXiv 1909.02625, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_stale.pipeline.alike.random_state import RandomState, replay
from lightning_stale.pipeline.block import Block, Features
from lightning_stale.pipeline.block_buffers import BlockBuffers
from lightning_stale.pipeline.forward_weights import ForwardWeights
from lightning_stale.pipeline.graph_inputs import GraphInputs
from lightning_stale.pipeline.values.strides import copied
from lightning_stale.pipeline.values.trees import map_tensors, put_together, take_apart, tensors
from lightning_stale.private.of_torch import versions_of

Gradients = list[Tensor | None]
"""One entry per tensor among the features that requires a gradient; None where nothing depends on it."""


@dataclass
class _Pending:
    """A batch whose backward is still to come."""

    inputs: Features
    begin: GraphInputs  # the tensors of the inputs
    outputs: list[Tensor] | None = None  # those that require a gradient, with their graph; None: to be recomputed
    random_state: RandomState | None = None
    weights: ForwardWeights | None = None  # those of the forward, if others are in place when its graph goes backward
    wanted: list[bool] = field(default_factory=list)  # which outputs required a gradient in the forward
    trained: list[bool] = field(default_factory=list)  # which parameters did


class Stage:
    """Stage ``k`` of the pipeline: owns block ``k`` and what its backward still needs.

    In iteration ``n`` it computes ``h_{k+1}^n = f_k(h_k^n; w_k)``, and for batch ``j = n - m_k`` the gradients of
    ``w_k`` and ``h_k^j`` from that of ``h_{k+1}^j`` (arXiv 1909.02625, Algorithm 1): with ``recompute`` at the weights
    of now, which is the paper's, or else at those of the forward.

    Args:
        block: the block.
        staleness: ``m_k``.
        recompute: keep inputs only, and run the block again, with the weights of then, before the backward. ``False``:
            keep the graph of the forward and a copy of its weights; the update applies to the current ones.
        first: whether its inputs are data, of any type, which need no gradient.
        last: whether its result goes to the loss; its graph is kept, and ``staleness`` is 0.
        context: entered around each run of the block (autocast, say).

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.block import Block
        >>> from lightning_stale.pipeline.stage import Stage
        >>> stage = Stage(Block(torch.nn.Linear(3, 2)), staleness=1)
        >>> for n in range(2):
        ...     (sent,) = stage.forward(n, (torch.ones(4, 3, requires_grad=True),))
        >>> sent.shape, stage.pending
        (torch.Size([4, 2]), [0, 1])
        >>> (gradient,) = stage.backward(0, [torch.ones(4, 2)])
        >>> gradient.shape, stage.pending
        (torch.Size([4, 3]), [1])
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
        self._buffers = BlockBuffers(block.module)
        self._mutates_inputs = True  # until the first forward has shown that it does not

    @property
    def pending(self) -> list[int]:
        """The batches whose backward is still to come, oldest first."""
        return list(self._pending)

    def forward(self, batch: int, features: Features) -> Features:
        """Run the block on ``features`` of ``batch``; return its result, a tuple of the next block's arguments.

        Unless this is the last stage, the result has no graph, and its tensors require a gradient where the backward of
        ``batch`` has use for one.

        Raises:
            TypeError: if the result cannot travel to the next stage.
        """
        objects: list[Any] = []
        tree, given = take_apart(features, objects)
        begin = GraphInputs(given, data=self.first)
        inputs = tuple(put_together(tree, begin.tensors, objects))
        if self.staleness > 0 and self.recompute:
            pending = _Pending(inputs, begin, random_state=_random_state(inputs))
            self._pending[batch] = pending
            with self._buffers.kept():
                outputs = self._run(inputs)  # its graph shows what requires a gradient, and is dropped
        else:  # with staleness 0 the backward follows before anything changes
            outputs = self._run(inputs)
            pending = self._pending[batch] = _Pending(inputs, begin)
            if self.staleness > 0:
                pending.weights = ForwardWeights(self.block.module)
        if self.last:
            return outputs
        tree, made = take_apart(outputs)
        pending.wanted = [tensor.requires_grad for tensor in made]
        pending.trained = self._trained()
        if not (self.staleness > 0 and self.recompute):
            pending.outputs = [tensor for tensor in made if tensor.requires_grad]
        own = self._memory()
        return tuple(put_together(tree, [_sendable(tensor, own) for tensor in made]))

    def evaluate(self, features: Features) -> Features:
        """Run the block without a backward to come.

        Raises:
            TypeError: if the result cannot travel to the next stage.
        """
        if self.first and self._mutates_inputs:  # the loader's own tensors, perhaps, which other stages read too
            features = tuple(map_tensors(copied, features))
        result = self.block(features)
        if not self.last:
            take_apart(result)
        return result

    def backward(self, batch: int, gradients: Gradients) -> Gradients:
        """Back-propagate ``gradients`` of the result of ``batch``; gradients of the parameters accumulate as usual.

        Args:
            batch: the oldest of :attr:`pending`.
            gradients: one for each tensor of the result that required a gradient, of its shape.

        Returns:
            The gradients of the inputs.

        Raises:
            RuntimeError: if the block has done something else when it ran again than the first time.
        """
        pending = self._pending[batch]
        with nullcontext() if pending.weights is None else pending.weights.in_place():
            outputs = pending.outputs if pending.outputs is not None else self._recomputed(pending)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return self.finish(batch)

    def finish(self, batch: int) -> Gradients:
        """Forget ``batch``, whose backward has run; return the gradients of its inputs."""
        return self._pending.pop(batch).begin.gradients()

    def _recomputed(self, pending: _Pending) -> list[Tensor]:
        assert pending.random_state is not None
        with replay(pending.random_state):
            outputs = take_apart(self._run(pending.inputs))[1]
        requiring = [output.requires_grad for output in outputs]
        others = len(outputs) != len(pending.wanted)
        if others or (requiring != pending.wanted and self._trained() == pending.trained):
            raise RuntimeError(
                f"of the {len(pending.wanted)} tensors that a block passed on, {sum(pending.wanted)} required a "
                f"gradient, and when it ran again for the same batch {sum(requiring)} of {len(requiring)}: make its "
                "forward do the same both times, or write DSPStrategy(recompute=False)"
            )
        return [output for output, wanted in zip(outputs, pending.wanted, strict=True) if wanted]

    def _trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.block.module.parameters()]

    def _memory(self) -> set[int]:
        """Return where the parameters and buffers are, which change while the neighbour still has the features."""
        module = self.block.module
        held = tensors([*module.parameters(), *module.buffers()])
        return {tensor.untyped_storage().data_ptr() for tensor in held if tensor.layout is torch.strided}

    def _run(self, inputs: Features) -> Features:
        """Run the block; a copy of the inputs if it changes them in place, as a leading ``ReLU(inplace=True)`` does."""
        given = map_tensors(copied, inputs) if self._mutates_inputs else inputs
        before = versions_of(tensors(given))
        with self._context():
            outputs = self.block(given)
        changed = before != versions_of(tensors(given))
        if changed and not self._mutates_inputs:
            raise RuntimeError(
                "a block changed its input in place, which it did not do for the first batch: make it do so "
                "always or never"
            )
        self._mutates_inputs = changed
        return outputs


def _sendable(tensor: Tensor, own: set[int]) -> Tensor:
    sent = tensor.detach()
    if tensor.untyped_storage().data_ptr() in own:
        sent = copied(sent)
    return sent.requires_grad_(tensor.requires_grad)


def _random_state(inputs: Features) -> RandomState:
    return RandomState.now(sorted({tensor.device.index for tensor in tensors(inputs) if tensor.is_cuda}))
