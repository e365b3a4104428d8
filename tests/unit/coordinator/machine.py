"""Workers that do whatever they may, in any order, lose connections and come again, against one coordinator.

The rules are what can happen; what must hold is checked after each of them. It is run by ``test_machine.py``, and for a
million events by ``make soak``.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightning_stale.coordinator import messages as m
from lightning_stale.coordinator.coordinator import Coordinator, OnLoss
from lightning_stale.events import Event, Recorder
from lightning_stale.events.stale_sync import StaleSyncCounts
from lightning_stale.paradigms import ASP, BSP, DSSP, SSP, Paradigm
from tests.unit.coordinator.queue_leases import QueueLeases

PARADIGMS = [
    st.builds(BSP),
    st.builds(ASP),
    st.builds(SSP, st.integers(0, 3)),
    st.builds(DSSP, lower=st.integers(0, 2), upper=st.integers(2, 5)),
]
ACTIONS = [
    *["ask", "push"] * 4,
    "join",
    "arrive",
    "set_thresholds",
    "finish",
    "lose",
    "abort",
    "fail",
    "speak_for_the_dead",
    "push_what_it_does_not_hold",
]
Choose = Callable[[Any], Any]
events = Counter[str]()
"""How many messages of each kind the coordinator has been told, over all runs of this process."""


class Worker:
    """What one generation of a rank knows of itself."""

    def __init__(self, rank: int, generation: int) -> None:
        self.rank, self.generation = rank, generation
        self.state = "new"  # or: ready, holding, waiting, asking, at a meeting
        self.lease: tuple[int, int] | None = None

    @property
    def who(self) -> tuple[int, int]:
        return self.rank, self.generation


class Machine(RuleBasedStateMachine):
    """One run."""

    @initialize(
        paradigm=st.one_of(PARADIGMS),
        members=st.integers(1, 5),
        batches=st.integers(0, 30),
        open_at_once=st.integers(1, 6),
        on_loss=st.sampled_from(["end", "go on"]),
    )
    def begin(self, paradigm: Paradigm, members: int, batches: int, open_at_once: int, on_loss: OnLoss) -> None:
        self.paradigm, self.members, self.batches, self.on_loss = paradigm, members, batches, on_loss
        self.leases = QueueLeases(batches, open_at_once)
        self.counts = StaleSyncCounts(members, paradigm.thresholds)
        self.recorded = 0
        recorder = Recorder(self.counts, self)
        self.coordinator = Coordinator(members, paradigm, leases=self.leases, on_loss=on_loss, record=recorder.record)
        self.workers: dict[int, Worker] = {}
        self.former: list[Worker] = []
        self.never = set(range(members))
        self.failure: tuple[str, str] | None = None
        self.told: Counter[int] = Counter()
        self.releases = 0
        self.now = 0.0

    def note(self, event: Event) -> None:
        self.recorded += 1

    # --- what can happen --------------------------------------------------------------------------------------------

    def tell(self, message: m.Message) -> list[m.Reply]:
        events[type(message).__name__] += 1
        self.now += 1.0
        replies = self.coordinator.handle(message, self.now)
        for reply in replies:
            self.hear(reply)
        return replies

    def hear(self, reply: m.Reply) -> None:
        if isinstance(reply, m.Joined):
            assert all(former.generation < reply.generation for former in self.former if former.rank == reply.member)
            self.workers[reply.member] = Worker(reply.member, reply.generation)
            self.never.discard(reply.member)
            return
        if isinstance(reply, m.Fenced):
            return
        worker = self.workers.get(reply.member)
        assert worker is not None, f"{reply} for who is not here"
        if isinstance(reply, m.Failed):
            self.told[reply.member] += 1
            assert self.failure in (None, (reply.kind, reply.text)), "there is one first failure"
            self.failure = (reply.kind, reply.text)
            return
        if isinstance(reply, m.Aborted | m.ThresholdsSet | m.Refused):
            return
        assert self.failure is None, f"{reply} after the run has failed"
        if isinstance(reply, m.Released):
            assert worker.state == "waiting"
            assert reply.lead <= self.bound, "the lead is above the bound"
            assert reply.lead == self.paradigm.lead(reply.member)
            worker.state, self.releases = "ready", self.releases + 1
        elif isinstance(reply, m.Met):
            assert worker.state == "at a meeting"
            worker.state = "ready"
        elif isinstance(reply, m.Granted):
            assert worker.state == "asking"
            if reply.batch is None:
                worker.state = "ready"
            else:
                worker.state, worker.lease = "holding", (reply.lease, reply.batch)
        else:
            raise AssertionError(reply)

    @property
    def bound(self) -> float:
        if isinstance(self.paradigm, SSP):
            return self.paradigm.threshold
        return self.paradigm.upper if isinstance(self.paradigm, DSSP) else float("inf")

    def some(self, choose: Choose, *states: str) -> Worker | None:
        able = [worker for worker in self.workers.values() if worker.state in states]
        return choose(able) if able else None

    def absent(self) -> set[int]:
        if self.on_loss == "end":
            return self.never
        return set(range(self.members)) - self.workers.keys()

    def join(self, choose: Choose) -> None:
        if self.absent():
            rank = choose(sorted(self.absent()))
            self.tell(m.Join(rank, process=4_000 + rank))

    def ask(self, choose: Choose) -> None:
        worker = self.some(choose, "ready")
        if worker is not None and self.failure is None:
            worker.state = "asking"
            self.tell(m.Request(*worker.who))

    def push(self, choose: Choose) -> None:
        worker = self.some(choose, "holding", "ready")
        if worker is None:
            return
        leases = () if worker.lease is None else (worker.lease[0],)
        worker.state, worker.lease = "waiting", None
        clock = self.paradigm.clocks.get(worker.rank)
        self.tell(m.Push(*worker.who, leases))
        if self.failure is None:
            assert clock is not None
            assert self.paradigm.clocks[worker.rank] == clock + 1

    def push_what_it_does_not_hold(self, choose: Choose) -> None:
        worker = self.some(choose, "holding", "ready")
        if worker is None or self.failure is not None:
            return
        lease = choose([-1, *self.leases.held, 10**6])
        if worker.lease is None or lease != worker.lease[0]:
            before, recorded = self.fingerprint(), self.recorded
            assert self.tell(m.Push(*worker.who, (lease,))) == [m.Refused(worker.rank, lease)]
            assert (self.fingerprint(), self.recorded) == (before, recorded), "a refused push has changed something"

    def arrive(self, choose: Choose) -> None:
        worker = self.some(choose, "ready", "new")
        if worker is not None:
            worker.state = "at a meeting"
            place = choose(["validation"] * 99 + ["the end of fit"])
            self.tell(m.Arrive(*worker.who, place, "step 1"))

    def set_thresholds(self, choose: Choose) -> None:
        worker = self.some(choose, "ready")
        if worker is not None and isinstance(self.paradigm, SSP):
            threshold = max(choose(range(6)), self.paradigm.threshold)  # one that falls binds later releases only
            self.tell(m.SetThresholds(*worker.who, {"threshold": threshold}))
            assert self.paradigm.threshold == threshold

    def finish(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready")
        if worker is not None and choose(range(20)) == 0:
            self.retire(worker)
            self.tell(m.Leave(*worker.who))

    def lose(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready", "holding", "waiting", "asking", "at a meeting")
        if worker is not None and choose(range(5 if self.on_loss == "go on" else 100)) == 0:
            self.retire(worker)
            self.tell(m.Lose(*worker.who))
            if self.on_loss == "end":
                assert self.coordinator.failure is not None

    def abort(self, choose: Choose) -> None:
        worker = self.some(choose, "new", "ready", "holding", "waiting")
        if worker is not None and choose(range(100)) == 0:
            before = self.coordinator.failure
            *_, aborted = self.tell(m.Abort(*worker.who, "error", "raised ValueError"))
            assert aborted == m.Aborted(worker.rank, "" if before is None else before.text)

    def fail(self, choose: Choose) -> None:
        if choose(range(300)) == 0:
            before = self.coordinator.failure
            self.tell(m.Fail("rank 0 has ended"))
            assert self.coordinator.failure is not None
            assert before is None or self.coordinator.failure == before

    def speak_for_the_dead(self, choose: Choose) -> None:
        if not self.former:
            return
        who: Any = choose(self.former).who
        message = choose(
            [
                m.Push(*who, (0,)),
                m.Request(*who),
                m.Arrive(*who, "validation"),
                m.SetThresholds(*who, {"threshold": 0}),
                m.Abort(*who, "error", "x"),
                m.Leave(*who),
                m.Lose(*who),
            ]
        )
        before, recorded = self.fingerprint(), self.recorded
        assert self.tell(message) == [m.Fenced(*who)]
        assert self.fingerprint() == before, "a fenced worker has changed something"
        assert self.recorded == recorded

    @rule(data=st.data(), names=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
    def happen(self, data: Any, names: list[str]) -> None:
        """A few things, each of which is found by itself where they break something."""
        for name in names:
            getattr(self, name)(lambda able: data.draw(st.sampled_from(able)))
            self.check()

    @rule(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 200))
    def happen_at_length(self, seed: int, length: int) -> None:
        """Many things, so that a run gets far; mostly work."""
        choice = random.Random(seed)
        for _ in range(length):
            getattr(self, choice.choice(ACTIONS))(choice.choice)
            self.check()

    def retire(self, worker: Worker) -> None:
        del self.workers[worker.rank]
        self.former.append(worker)

    def fingerprint(self) -> Any:
        return copy.deepcopy(
            (
                self.paradigm.state_dict(),
                dict(self.coordinator.membership.present),
                self.coordinator.failure,
                list(self.coordinator.meeting.waiting),
                (list(self.leases.queue), self.leases.held, self.leases.committed, self.leases.line),
                self.counts.state_dict(),
            )
        )

    # --- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "workers"):
            return
        self.every_batch_is_in_one_place()
        self.a_lease_is_held_by_who_is_here()
        self.somebody_can_go_on()
        self.all_hear_of_a_failure()
        self.what_is_counted_is_what_has_happened()

    def every_batch_is_in_one_place(self) -> None:
        if self.failure is None:
            held = [batch for _, batch in self.leases.held.values()]
            assert sorted([*self.leases.queue, *held, *self.leases.committed]) == list(range(self.batches))

    def a_lease_is_held_by_who_is_here(self) -> None:
        if self.failure is None:
            theirs = {worker.lease: worker.rank for worker in self.workers.values() if worker.lease is not None}
            assert {(lease, batch): rank for lease, (rank, batch) in self.leases.held.items()} == theirs

    def somebody_can_go_on(self) -> None:
        if self.failure is not None or not self.workers or self.never:
            return
        able = [worker for worker in self.workers.values() if worker.state in ("new", "ready", "holding")]
        assert able, {worker.rank: worker.state for worker in self.workers.values()}

    def all_hear_of_a_failure(self) -> None:
        if self.coordinator.failure is not None and self.workers:
            assert self.failure is not None
            assert all(self.told[rank] >= 1 for rank in self.workers)

    def what_is_counted_is_what_has_happened(self) -> None:
        assert sum(worker.releases for worker in self.counts.workers) == self.releases
        assert max((worker.max_lead for worker in self.counts.workers), default=0) <= self.bound

    def teardown(self) -> None:
        """Whoever is left works on: every batch is trained once, and nobody waits for ever."""
        if not hasattr(self, "workers") or self.failure is not None:
            return
        while self.absent() and self.on_loss == "go on":
            self.tell(m.Join(min(self.absent()), process=1))
        if self.never or not self.workers:
            return
        for _ in range(40 * (self.batches + self.members + 1)):
            self.work_on()
            if all(worker.state == "done" for worker in self.workers.values()) or self.failure is not None:
                break
        if self.failure is not None:  # they were at different places
            assert "different places" in self.failure[1]
            return
        assert sorted(self.leases.committed) == list(range(self.batches)), "every batch is committed exactly once"

    def work_on(self) -> None:
        for worker in list(self.workers.values()):
            if worker.state == "new":
                worker.state = "at a meeting"
                self.tell(m.Arrive(*worker.who, "validation"))
            elif worker.state == "holding":
                assert worker.lease is not None
                lease, worker.lease, worker.state = worker.lease[0], None, "waiting"
                self.tell(m.Push(*worker.who, (lease,)))
            elif worker.state == "ready":
                waiting = any(other.state in ("at a meeting", "waiting") for other in self.workers.values())
                if waiting:
                    worker.state = "at a meeting"  # so that who waits there, or for this one, goes on
                    self.tell(m.Arrive(*worker.who, "validation"))
                elif len(self.leases.committed) < self.batches:
                    worker.state = "asking"
                    self.tell(m.Request(*worker.who))
                else:
                    worker.state = "done"
