"""What a process begins with that joins a fit that runs: all that rank 0 knows, but for what the server has.

Rank 0 writes it down as all ask for batches anew after a meeting, when nobody is amid anything. The newcomer resumes
from it as from a checkpoint, and is then where all were at that moment: as one of them who has been slow since.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_stale.private import of_checkpoints
from lightning_stale.strategies.updates.update import unique_parameters

_ENTRY = "lightning_stale_starting_point"


def write_down(trainer: Trainer, batches: Mapping[str, Any], workers: int) -> bytes:
    """Return where this rank is, and what it has, alone and without waiting for anybody.

    Args:
        trainer: between two batches.
        batches: ``BatchesOnDemand.segment()``.
        workers: among how many the batches of an epoch are shared.
    """
    parameters = unique_parameters(trainer.optimizers)
    trained = {parameter.data_ptr() for parameter in parameters if parameter.numel()}
    checkpoint = of_checkpoints.dump(trainer, trained)
    identities = {id(parameter) for parameter in parameters}
    checkpoint[_ENTRY] = {
        "batches": dict(batches),
        "workers": workers,
        "unsaved": of_checkpoints.unsaved_state(trainer),
        "untrained": {
            name: tensor.detach().clone()
            for name, tensor in _tensors_of(trainer.lightning_module).items()
            if id(tensor) not in identities
        },
    }
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


class StartingPoint:
    """Lets the fit that is about to start begin where rank 0 was.

    Args:
        trainer: its model is attached.
        fetch: returns what :func:`write_down` did; called as the trainer resumes, or earlier where it must be known.

    Attributes:
        workers: among how many the batches of an epoch are shared.
        batches: where in the epoch all were.
    """

    def __init__(self, trainer: Trainer, fetch: Callable[[], bytes]) -> None:
        self._trainer, self._fetch = trainer, fetch
        self._entry: dict[str, Any] | None = None
        self._undo = [
            of_checkpoints.resume_from(trainer, self._load, self._load_untrained),
            of_checkpoints.begin_amid(trainer, self._begin),
        ]

    @property
    def workers(self) -> int:
        return int(self._known["workers"])

    @property
    def batches(self) -> Mapping[str, Any]:
        known: Mapping[str, Any] = self._known["batches"]
        return known

    @property
    def known(self) -> bool:
        """Whether it has been fetched."""
        return self._entry is not None

    def undo(self) -> None:
        """Let this trainer resume as any other."""
        for undo in self._undo:
            undo()

    @property
    def _known(self) -> dict[str, Any]:
        assert self._entry is not None, "the trainer has resumed by now"
        return self._entry

    def _load(self) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(io.BytesIO(self._fetch()), map_location="cpu", weights_only=False)
        self._entry = checkpoint.pop(_ENTRY)
        return checkpoint

    @torch.no_grad()
    def _load_untrained(self, module: nn.Module) -> None:
        own = _tensors_of(module)
        for name, value in self._known["untrained"].items():
            if own[name].shape == value.shape:
                own[name].copy_(value)
            else:  # a queue that has grown
                own[name].data = value.to(own[name])

    def _begin(self) -> None:
        of_checkpoints.set_unsaved_state(self._trainer, self._known["unsaved"])


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
