"""How a model's parameters and gradients meet the buffers of the parameter client, on the CPU and on an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_stale.parameter_server.client import ParameterClient
from lightning_stale.private import of_torch


class ModelMemory(ABC):
    """Moves gradients into the client's buffer, and its weights into the model.

    Args:
        client: with the buffers.
        parameters: the model's, by name, in the order of the buffers.
        alone: whether this is the only worker: what it does to the weights itself counts then.
    """

    def __init__(self, client: ParameterClient, parameters: Mapping[str, Tensor], alone: bool) -> None:
        self._client = client
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._alone = alone
        self._warned = False
        self._versions: list[int] = []

    def collect(self, indices: Sequence[int]) -> list[bool]:
        """Have the gradients of the parameters at ``indices`` in the client's buffer; return which exist."""
        self.look_for_changes()
        return self._collect(indices)

    def spread(self, indices: Sequence[int] | None = None) -> None:
        """Have the client's weights at ``indices`` (all by default) in the model.

        To autograd, that is a change in place, as a step of a plain optimizer is: a graph that needs the values from
        before raises in its backward pass, and does not mix them with the new ones.
        """
        self._spread(range(len(self._parameters)) if indices is None else indices)
        self.remember()

    def remember(self) -> None:
        """Take the weights as they are for those of the server."""
        self._versions = of_torch.versions_of(self._parameters)

    @abstractmethod
    def release(self) -> None:
        """Let go of the client's buffers; the model keeps its weights."""

    @abstractmethod
    def _collect(self, indices: Sequence[int]) -> list[bool]: ...

    @abstractmethod
    def _spread(self, indices: Iterable[int]) -> None: ...

    def _is_replaced(self, index: int) -> bool:
        """Whether the parameter's memory is no longer that which was bound (``parameter.data = ...``)."""
        return False

    @torch.no_grad()
    def look_for_changes(self) -> None:
        """Find weights that somebody has changed since the last pull, other than the optimizer; before the next one."""
        changed = []
        now = of_torch.versions_of(self._parameters)
        for index, (parameter, version) in enumerate(zip(self._parameters, self._versions, strict=True)):
            if now[index] == version and not self._is_replaced(index):
                continue
            if self._alone:
                self._client.weights[index].copy_(parameter)
                changed.append(index)
            elif not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{self._names[index]} was changed outside of the optimizer, and the parameter server, where the "
                    "weights are, does not know: the change is lost at the next pull. Make it in the optimizer, "
                    "e.g. in the step of a subclass."
                )
        if changed:
            self._client.tell_changes(changed)

    def _gradient(self, index: int) -> Tensor | None:
        gradient = self._parameters[index].grad
        if gradient is not None and gradient.layout != torch.strided:
            raise MisconfigurationException(
                f"{self._names[index]} has a sparse gradient, which cannot be pushed: write Embedding(sparse=False), "
                "or make the gradient dense"
            )
        return gradient


class SharedModelMemory(ModelMemory):
    """CPU: the model's parameters *are* the client's weights, and gradients are put straight into its buffer.

    The server writes new weights only while the worker waits for its OK or pulls, and only those that it asks for, so
    no copy and no lock is needed.
    """

    def __init__(self, client: ParameterClient, parameters: Mapping[str, Tensor], alone: bool) -> None:
        super().__init__(client, parameters, alone)
        self._hooks = []
        for parameter, gradient in zip(self._parameters, client.gradients, strict=True):
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_PutInto(gradient)))  # type: ignore[no-untyped-call]
        self.spread()

    def _collect(self, indices: Sequence[int]) -> list[bool]:
        used = []
        for index in indices:
            gradient = self._gradient(index)
            used.append(gradient is not None)
            if gradient is not None and gradient.data_ptr() != self._client.gradients[index].data_ptr():
                self._client.gradients[index].copy_(gradient.detach())
        return used

    def _spread(self, indices: Iterable[int]) -> None:
        for index in indices:
            if self._is_replaced(index):
                self._parameters[index].data = self._client.weights[index]
        torch.autograd.graph.increment_version([self._parameters[index] for index in indices])

    def _is_replaced(self, index: int) -> bool:
        return self._parameters[index].data_ptr() != self._client.weights[index].data_ptr()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for index, parameter in enumerate(self._parameters):
            if not self._is_replaced(index):
                parameter.data = parameter.data.clone()
            parameter.grad = None


class _PutInto:
    """Moves a gradient into the push buffer as soon as it is computed, as DDP's buckets do: it is in the cache then."""

    def __init__(self, view: Tensor) -> None:
        self._view = view

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.requires_grad or gradient.layout != torch.strided:
            return
        if gradient.data_ptr() != self._view.data_ptr():
            self._view.copy_(gradient)
            parameter.grad = self._view


class StagedModelMemory(ModelMemory):
    """CUDA: the client's buffers are pinned, and copies run on a stream of their own."""

    def __init__(
        self, client: ParameterClient, parameters: Mapping[str, Tensor], alone: bool, device: torch.device
    ) -> None:
        super().__init__(client, parameters, alone)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = _pin(client.buffer)
        self.spread()

    def _collect(self, indices: Sequence[int]) -> list[bool]:
        used = []
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for index in indices:
                gradient = self._gradient(index)
                used.append(gradient is not None)
                if gradient is not None:
                    self._client.gradients[index].copy_(gradient.detach(), non_blocking=True)
        self._stream.synchronize()
        return used

    @torch.no_grad()
    def _spread(self, indices: Iterable[int]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for index in indices:
                self._parameters[index].copy_(self._client.weights[index], non_blocking=True)
        self._stream.synchronize()  # the server may write the buffer again as soon as this worker calls

    def release(self) -> None:
        if self._pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostUnregister(self._client.buffer.data_ptr()))
            self._pinned = False


def _pin(buffer: Tensor) -> bool:
    """Page-lock ``buffer`` for asynchronous copies; False where the system refuses, and copies are merely slower."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0
