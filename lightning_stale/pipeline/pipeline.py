"""The stages that live in this process, and their way through training, draining and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning_stale import events
from lightning_stale.pipeline.alike.random_streams import Streams
from lightning_stale.pipeline.block import Features
from lightning_stale.pipeline.channels.channel import Channel, MemoryChannel
from lightning_stale.pipeline.schedule import drain, iteration
from lightning_stale.pipeline.stage import Stage


class Pipeline:
    """Consecutive stages of one process: one of several processes, or all of them (virtual stages).

    Args:
        stages: the stages, in order.
        features_in: features from the stage before; ``None`` if the first is here.
        features_out: features to the stage after; ``None`` if the last is here.
        gradients_in: gradients from the stage after.
        gradients_out: gradients to the stage before.
        first: the number of the first of them.
        streams: which random numbers are drawn.
        record: is told what happens.

    Example::

        >>> import torch
        >>> from lightning_stale.pipeline.block import Block
        >>> from lightning_stale.pipeline.pipeline import Pipeline
        >>> from lightning_stale.pipeline.stage import Stage
        >>> blocks = [Block(torch.nn.Linear(4, 4)) for _ in range(2)]
        >>> pipeline = Pipeline([Stage(blocks[0], 1, first=True), Stage(blocks[1], 0, last=True)])
        >>> for n in range(3):  # m = (1, 0): the first stage's backward is one batch behind
        ...     (y,) = pipeline.forward((torch.ones(2, 4),))
        ...     y.sum().backward()
        ...     pipeline.backward()
        >>> [stage.pending for stage in pipeline.stages]
        [[2], []]
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        features_in: Channel | None = None,
        features_out: Channel | None = None,
        gradients_in: Channel | None = None,
        gradients_out: Channel | None = None,
        *,
        first: int = 0,
        streams: Streams | None = None,
        record: Callable[[events.Event], None] = lambda event: None,
    ) -> None:
        self.stages = list(stages)
        self._first = first
        self._streams = streams or Streams()
        self.told = b""
        """What the first stage's process has said of the batch that the last one has got."""
        self._features_in, self._features_out = features_in, features_out
        self._gradients: list[Channel | None] = [
            gradients_out,
            *(MemoryChannel() for _ in self.stages[1:]),
            gradients_in,
        ]
        self._batch = 0  # n: counted from the last drain
        self._evaluated = 0
        self._widened = False
        self._record = record

    @property
    def has_last(self) -> bool:
        """Whether the last stage, and with it the loss, is here."""
        return self.stages[-1].last

    @property
    def behind(self) -> bool:
        """Whether backwards are left."""
        return any(stage.pending for stage in self.stages)

    def forward(self, features: Features, tell: bytes = b"") -> Features | None:
        """Run iteration ``n`` forward; return the result with its graph if the last stage is here, else pass it on.

        ``tell``: what the first stage's process says of the batch, for :attr:`told`.
        """
        return self._through(features, tell, self._batch, "forward", lambda stage, h: stage.forward(self._batch, h))

    def evaluate(self, features: Features, tell: bytes = b"") -> Features | None:
        """Run the blocks without a backward to come."""
        result = self._through(features, tell, self._evaluated, "evaluation", lambda stage, h: stage.evaluate(h))
        self._evaluated += 1
        return result

    def backward(self) -> None:
        """Run the backwards of iteration ``n``; that of the last stage's loss has run already."""
        for k in reversed(range(len(self.stages))):
            for operation in iteration(self._batch, self.stages[k].staleness):
                if operation.kind == "backward":
                    self._backward(k, operation.batch)
        self._batch += 1

    def drain(self, step: Callable[[], None]) -> None:
        """Run the backwards that are left, the oldest of each stage first, with a ``step`` after each."""
        left = [list(drain(self._batch, stage.staleness)) for stage in self.stages]
        while any(left):
            for k in reversed(range(len(self.stages))):
                if left[k]:
                    self._backward(k, left[k].pop(0).batch)
            step()

    def restart(self) -> None:
        """Count batches from 0 again: the pipeline fills anew."""
        self._end(self._batch)
        self._batch = 0

    def end_evaluation(self) -> None:
        """See that all stages have evaluated as many batches."""
        self._end(self._evaluated)

    def _end(self, batches: int) -> None:
        """Tell the neighbours that no batch follows here: one who waits for one, or sends one more, must not hang."""
        end = -1 - batches
        for sender in (self._features_out, self._gradients[0]):
            if sender is not None:
                sender.send(end, None)
        for receiver in (self._features_in, self._gradients[-1]):
            if receiver is not None:
                receiver.receive(end)

    def widen(self) -> None:
        """Take in all gradients of the batches under way: this stage is about to wait for the others at some batch.

        As far as the queues are concerned, the next stage may be behind this one at any time.
        """
        if self.behind and not self._widened:
            self._widened = True
            if self._gradients[-1] is not None:
                self._gradients[-1].widen(self.stages[-1].staleness)

    def from_last(self, value: bytes) -> bytes:
        """Return the last stage's ``value`` in all processes; for a pipeline that has nothing under way."""
        following, before = self._gradients[-1], self._gradients[0]
        if following is not None:
            value = following.receive(self._batch).encode("latin-1")
        if before is not None:
            before.send(self._batch, value.decode("latin-1"))
        return value

    def note_backward(self, started: float) -> None:
        """Note that the backward of the last stage, which is the loss's, has run since ``started``."""
        self._note(self._first + len(self.stages) - 1, self._batch, "backward", started)

    def _through(
        self,
        features: Features,
        told: bytes,
        batch: int,
        work: Literal["forward", "evaluation"],
        run: Callable[[Stage, Features], Features],
    ) -> Features | None:
        training = work == "forward"
        if self._features_in is not None:
            incoming = self._receive(self._features_in, batch, self._first if training else None, "features")
            features, drawn, said = incoming
            self._streams.hear(drawn.encode("latin-1"))
            told = said.encode("latin-1")
        self.told = told
        with self._streams.body():
            for k, stage in enumerate(self.stages, self._first):
                self._streams.block(k)
                started = time.perf_counter()
                features = run(stage, features)
                self._note(k, batch, work, started)
        if self._features_out is None:
            return features
        message = (features, self._streams.tell().decode("latin-1"), told.decode("latin-1"))
        last = self._first + len(self.stages) - 1
        self._send(self._features_out, batch, message, last if training else None, "features")
        return None

    def _backward(self, k: int, batch: int) -> None:
        stage = self.stages[k]
        if stage.last:
            gradients = stage.finish(batch)
        else:
            source = self._gradients[k + 1]
            assert source is not None
            incoming = self._receive(source, batch, self._first + k, "gradients")
            started = time.perf_counter()
            gradients = stage.backward(batch, incoming)
            self._note(self._first + k, batch, "backward", started)
        target = self._gradients[k]
        if target is not None:
            self._send(target, batch, gradients, self._first + k, "gradients")
        elif k > 0 or not stage.first:
            raise AssertionError("a stage without a neighbour that is not the first")

    def _receive(self, channel: Channel, batch: int, stage: int | None, what: events.Travels) -> Any:
        """Receive for ``stage``; ``None``: for an evaluation, of which nothing is noted."""
        queued, started = channel.queued(), time.perf_counter()
        value = channel.receive(batch)
        if stage is not None:
            now = time.perf_counter()
            self._record(events.Received(now, stage, batch, what, now - started, queued))
        return value

    def _send(self, channel: Channel, batch: int, value: Any, stage: int | None, what: events.Travels) -> None:
        started = time.perf_counter()
        channel.send(batch, value)
        if stage is not None:
            now = time.perf_counter()
            self._record(events.Sent(now, stage, batch, what, now - started))

    def _note(self, stage: int, batch: int, work: Literal["forward", "backward", "evaluation"], started: float) -> None:
        now = time.perf_counter()
        self._record(events.StageRan(now, stage, batch, work, now - started))
