"""Loops that are granted batches, in any order of events: what Lightning counts, and when its optimizer steps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_stale.coordinator.leases import EpochLeases, Grant, Plan
from lightning_stale.data.on_demand import BatchesOnDemand


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self) -> None: ...

    def validation_step(self) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loop:
    """As much of Lightning's training loop as counts, around a real Trainer's counters."""

    def __init__(self, rank: int, run: Run) -> None:
        self.rank, self.run = rank, run
        self.trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accumulate_grad_batches=run.each,
            max_epochs=3,
        )
        self.trainer.strategy._lightning_module = Model()
        self.trainer.strategy._lightning_module.trainer = self.trainer
        self.fit_loop, self.loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        self.fit_loop.max_batches = run.length
        self.trainer.val_check_batch = run.check
        self.loop.val_loop._data_source = SimpleNamespace(is_defined=lambda: True)
        self.fit_loop._data_fetcher = SimpleNamespace(fetched=0, done=False)
        self.grant: Grant | None = None
        self.idle = False  # it has no batch until the next meeting
        self.batches = BatchesOnDemand(self.trainer, run.workers, self.request, prefetch=run.prefetch)
        self.trained: list[int] = []
        self.ends = [*range(run.check, run.length, run.check), run.length]

    def request(self, leases: Any, plan: Plan | None) -> Grant:
        assert self.grant is not None
        return self.grant

    @property
    def waits(self) -> bool:
        return self.grant is None

    def ask(self) -> None:
        """At the start, or after a meeting: ask with the plan."""
        if self.trainer.current_epoch != self.batches._epoch:
            self.batches._begin_epoch(self.run.order)
        self.run.leases.open(self.batches._plan(), [loop.rank for loop in self.run.loops])
        self.run.tell(self.run.leases.request(self.rank))

    def compute(self) -> None:
        """Train one batch; after the last of a step, push and ask."""
        fetcher, progress = self.fit_loop._data_fetcher, self.loop.batch_progress
        assert not fetcher.done
        numbers = self.batches.next_batch(self.run.order)
        if not numbers:
            self.go_on_without()
            return
        if self.batches.spare:
            self.compute_what_others_train()
            return
        self.trained.append(numbers[0])
        fetcher.fetched += 1
        fetcher.done = fetcher.fetched >= self.run.length
        progress.is_last_batch = fetcher.done
        progress.increment_ready()
        progress.increment_started()
        assert 0 <= self.loop.batch_idx < self.run.length
        grant, whole = self.grant, self.batches._next == self.grant.last
        assert self.loop._should_accumulate() == (not whole), "a step has just the batches of its lease"
        if whole:
            self.loop.automatic_optimization.optim_progress.optimizer.step.increment_ready()
            self.grant = None
            granted = self.run.leases.commit(self.rank, self.batches.leases)
            self.pushed = grant
            self.run.tell(granted)
            self.run.tell(self.run.leases.request(self.rank))
        else:
            progress.increment_processed()
            progress.increment_completed()

    def compute_what_others_train(self) -> None:
        """A batch like any, of which nothing is pushed."""
        fetcher, progress = self.fit_loop._data_fetcher, self.loop.batch_progress
        fetcher.fetched += 1
        progress.is_last_batch = fetcher.done = fetcher.fetched >= self.run.length
        progress.increment_ready()
        progress.increment_started()
        assert not self.loop._should_accumulate()
        stepped = self.loop.automatic_optimization.optim_progress.optimizer.step
        stepped.increment_ready()
        self.batches.took_step(None)
        stepped.increment_completed()
        progress.increment_processed()
        progress.increment_completed()
        self.idle = False
        self.is_where_all_meet(self.grant)

    def go_on_without(self) -> None:
        """What Lightning does where a loader yields ``None``: it runs no step."""
        fetcher, progress = self.fit_loop._data_fetcher, self.loop.batch_progress
        fetcher.fetched += 1
        progress.is_last_batch = fetcher.done = fetcher.fetched >= self.run.length
        progress.increment_ready()
        progress.increment_processed()
        progress.increment_completed()
        self.idle = False
        self.is_where_all_meet(self.grant)

    def hear(self, grant: Grant) -> None:
        """The OK has come, or the first grant."""
        asked_first = self.batches._grant is None
        self.grant = grant
        if asked_first:
            self.idle = grant.over
            return
        self.batches.took_step(grant)
        stepped, progress = self.loop.automatic_optimization.optim_progress.optimizer.step, self.loop.batch_progress
        stepped.increment_completed()
        progress.increment_processed()
        progress.increment_completed()
        self.is_where_all_meet(grant)

    def is_where_all_meet(self, grant: Grant) -> None:
        stepped, progress = self.loop.automatic_optimization.optim_progress.optimizer.step, self.loop.batch_progress
        assert not self.loop._should_accumulate()
        current = progress.current
        for counts in (current, progress.total):
            assert counts.ready == counts.started == counts.processed == counts.completed
        assert math.ceil(current.ready / self.run.each) == stepped.current.completed
        assert stepped.total.completed == stepped.total.ready == self.trainer.global_step == stepped.current.completed
        assert self.loop._batches_that_stepped + 1 == stepped.current.completed
        assert self.loop._skip_next_val == (not grant.over)
        assert (current.ready in self.ends) >= grant.over
        if grant.over:
            assert current.ready == self.run.until
        assert self.loop._num_ready_batches_reached() == (grant.over and current.ready == self.run.length)


class Run:
    """All workers, and one who hands out the batches."""

    def __init__(
        self, workers: int, length: int, each: int, extra: int, check: int, prefetch: int, further: int
    ) -> None:
        self.workers, self.length, self.each, self.prefetch = workers, length, each, prefetch
        self.check = max(1, min(length, check * each))
        self.order = [[number] for number in range(workers * length + extra)]
        self.leases = EpochLeases(workers)
        self.until = min(self.check, length)
        self.loops = [Loop(rank, self) for rank in range(workers + further)]

    def tell(self, grants: Any) -> None:
        for member, grant in grants:
            self.loops[member].hear(grant)


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(1, 4),
    length=st.integers(1, 9),
    each=st.integers(1, 4),
    extra=st.integers(0, 3),
    check=st.integers(1, 3),
    prefetch=st.integers(0, 5),
    further=st.sampled_from([0, 0, 1, 3]),
    random=st.randoms(use_true_random=False),
)
def test_steps_have_the_batches_of_their_leases_whoever_is_fast(
    workers: int, length: int, each: int, extra: int, check: int, prefetch: int, further: int, random: Any
) -> None:
    run = Run(workers, length, each, min(extra, workers - 1), check, prefetch, further)
    speeds = [random.choice([1, 1, 3, 20]) for _ in run.loops]
    for loop in run.loops:
        loop.ask()
    while True:
        able = [loop for loop in run.loops if loop.grant is not None and (loop.idle or not loop.grant.over)]
        if able:
            random.choices(able, [speeds[loop.rank] for loop in able])[0].compute()
            continue
        assert all(loop.grant is not None and loop.grant.over for loop in run.loops), "nobody waits for ever"
        if run.until == length:
            break
        run.until = min(run.until + run.check, length)
        for loop in run.loops:
            loop.batches.has_met()
            loop.grant = None
        for loop in run.loops:
            loop.ask()
    assert sorted(number for loop in run.loops for number in loop.trained) == list(range(len(run.order)))
    assert {loop.trainer.global_step for loop in run.loops} == {math.ceil(length / each)}
